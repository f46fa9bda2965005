"""How the time and memory of our kernel grow with N, c and p.

Each point is a worker of its own; the points of a sweep are interleaved. The exponents
are least-squares slopes of log cost against log N, c or p.
"""

import math
from dataclasses import asdict, replace
from typing import Any

from bench.fleet import Limits, Result, interpreters, race
from bench.report import digits, table
from bench.roster import Case

BASES = {
    "MLP 784-4×512-10": Case("mlp", 64, 10, 512),
    "CNN 3×16×16, channels 32-32-64": Case("small_cnn", 32, 10, 32),
}
SWEEPS: dict[str, dict[str, list[int]]] = {
    "mlp": {
        "n": [32, 64, 128, 256, 512],
        "outputs": [4, 8, 16, 32, 64],
        "width": [128, 256, 512, 1024, 2048],
    },
    "small_cnn": {
        "n": [16, 32, 64, 128],
        "outputs": [4, 8, 16, 32],
        "width": [16, 32, 64, 128],
    },
}
SYMBOLS = {"n": "N", "outputs": "c", "width": "p"}


def slope(x: list[float], y: list[float]) -> float:
    """Least-squares exponent b of y = a xᵇ."""
    log_x, log_y = ([math.log(value) for value in values] for values in (x, y))
    mean_x, mean_y = sum(log_x) / len(x), sum(log_y) / len(y)
    pairs = list(zip(log_x, log_y, strict=True))
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in pairs)
    return covariance / sum((a - mean_x) ** 2 for a in log_x)


def parameters(case: Case) -> int:
    """Number of parameters of a network of `BASES`."""
    w, c = case.width or 0, case.outputs
    if case.network == "mlp":
        return 785 * w + 3 * w * (w + 1) + (w + 1) * c
    return 28 * w + 9 * w * w + w + 18 * w * w + 2 * w + (2 * w + 1) * c


def sweep(base: Case, axis: str, rounds: int, python: str) -> list[dict[str, Any]]:
    """The points along one axis."""
    values = SWEEPS[base.network][axis]
    cases = {str(value): replace(base, **{axis: value}) for value in values}
    jobs = {name: (python, "ours", case) for name, case in cases.items()}
    results, _ = race(jobs, None, Limits(rounds=rounds))
    return [_point(cases[name], result) for name, result in results.items()]


def _point(case: Case, result: Result) -> dict[str, Any]:
    point = asdict(case) | {"parameters": parameters(case), "reason": result.reason}
    if result.reason:
        return point
    flops = result.facts.get("flops")
    costs = {"seconds": result.seconds, "memory": result.peak, "flops": flops}
    return point | costs


def growth(rounds: int) -> dict[str, Any]:
    """Measure and print every sweep; returns points and exponents."""
    python = interpreters(["ours"])["ours"]
    everything: dict[str, Any] = {}
    fits = []
    for title, base in BASES.items():
        for axis, symbol in SYMBOLS.items():
            points = sweep(base, axis, rounds, python)
            key = "parameters" if symbol == "p" else axis
            print(f"\n{title}: growth with {symbol}")
            print("\n".join(_table(points)), flush=True)
            done = [point for point in points if not point["reason"]]
            exponents = {
                cost: slope([p[key] for p in done], [p[cost] for p in done])
                for cost in ("seconds", "memory", "flops")
                if len(done) > 1 and all(p[cost] for p in done)
            }
            everything[f"{base.network} {symbol}"] = {
                "points": points,
                "exponents": exponents,
            }
            fits.append([title, symbol, *(_exponent(exponents, c) for c in COSTS)])
    print("\nFitted exponents of seconds, memory and the operations of the plan")
    print("\n".join(table(["network", "in", *COSTS], fits, left=2)))
    return everything


COSTS = ("seconds", "memory", "flops")


def _exponent(exponents: dict[str, float], cost: str) -> str:
    return f"{exponents[cost]:.2f}" if cost in exponents else "-"


def _table(points: list[dict[str, Any]]) -> list[str]:
    header = ["N", "c", "p", "seconds", "memory MB", "GFLOP"]
    lines = []
    for point in points:
        sizes = [str(point["n"]), str(point["outputs"]), f"{point['parameters']:,}"]
        if point["reason"]:
            lines.append([*sizes, "-", "-", point["reason"][:40]])
            continue
        flops = point["flops"]
        lines.append(
            [
                *sizes,
                digits(point["seconds"]),
                f"{point['memory'] / 1e6:.0f}",
                digits(flops / 1e9 if flops else None),
            ]
        )
    return table(header, lines, left=0)

"""Times our kernels beside their rivals, and how the cost grows.

    make bench                                     everything
    make bench ARGS="--cases mlp64,cnn32 --rounds 3"
    make bench ARGS="--peers ours,rows,recipe --json outputs/bench.json"
    make bench ARGS=growth                         time and memory against N, c and p
    make bench ARGS=epoch                          one measurement beside an epoch

Seconds are medians of warm calls in the counted rounds. The float32 error is that of
the block of the first two and last two examples against autograd in float64. Memory is
the highest a call reaches beside interpreter, libraries, model and inputs. The floor
is one forward and c activation-only backward passes, measured, and the operations of
our plan at the rate of a square matrix product measured in the same rounds. "First
call" includes our planning and the compilation of JAX.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.epoch import epoch
from bench.fleet import Limits, Result, interpreters, race
from bench.growth import growth
from bench.report import Summary, case_table, overview, summarize, title, verdict
from bench.roster import CASES, PEERS, Case


def run_case(
    name: str, peers: dict[str, str], limits: Limits, known: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Measure one case, print it, and return everything about it.

    Args:
        name: Key of the case.
        peers: Key of the peer -> its interpreter.
        limits: What it may cost.
        known: What was measured so far, by case.
    """
    case = CASES[name]
    peers = {p: i for p, i in peers.items() if name in (PEERS[p].only or CASES)}
    with tempfile.TemporaryDirectory() as folder:
        data = str(Path(folder) / "case.npz")
        command = [sys.executable, "-m", "bench.reference", json.dumps(asdict(case))]
        output = subprocess.run(
            [*command, data], check=True, capture_output=True, text=True
        ).stdout
        parameters = int(output)
        refused = {p: too_much(p, case, parameters, limits, known) for p in peers}
        jobs = {p: (i, p, case) for p, i in peers.items() if not refused[p]}
        results, versions = race(jobs, data, limits)
    results |= {p: Result(p, reason=r) for p, r in refused.items() if r}
    results = {p: results[p] for p in peers}
    summary = summarize(results)
    print(f"\n{title(name, case, parameters)}")
    print("\n".join([*case_table(results, summary), *verdict(results, summary)]))
    sys.stdout.flush()
    return {
        "case": case,
        "parameters": parameters,
        "results": results,
        "summary": summary,
        "versions": versions,
    }


def too_much(
    peer: str,
    case: Case,
    parameters: int,
    limits: Limits,
    known: dict[str, dict[str, Any]],
) -> str:
    """Why a peer is not tried, or nothing: every peer is at least linear in N."""
    dense = 4 * case.n * case.outputs * parameters
    if PEERS[peer].dense and dense > limits.dense:
        return f"its Jacobian would take {dense / 1e9:.1f} GB"
    for name, record in known.items():
        result, n = record["results"].get(peer), record["case"].n
        if result is None or record["case"].network != case.network or n >= case.n:
            continue
        slow = result.reason.startswith("more than")
        if slow or (not result.reason and result.seconds * case.n / n > limits.cap):
            took = result.reason or f"{result.seconds:.0f} s"
            return f"more than {limits.cap:.0f} s: {took} in {name}"
    return ""


def processor() -> str:
    """Name of the processor and how many cores there are."""
    path, name = Path("/proc/cpuinfo"), platform.processor()
    if path.exists():
        lines = path.read_text().splitlines()
        names = [x.partition(": ")[2] for x in lines if x.startswith("model name")]
        name = names[0] if names else name
    return f"{name}, {os.cpu_count()} cores"


def serialized(record: dict[str, Any]) -> dict[str, Any]:
    """A case as JSON has it."""
    summary: Summary = record["summary"]
    return {
        "case": asdict(record["case"]),
        "parameters": record["parameters"],
        "ratios": summary.ratios,
        "floor": summary.floor,
        "flop_rate": summary.flop_rate,
        "results": {p: asdict(r) for p, r in record["results"].items()},
    }


def bench(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the cases, print their tables, and return it all for JSON."""
    limits = Limits(rounds=args.rounds, patience=args.patience, cap=args.cap)
    found = interpreters(args.peers)
    start = time.monotonic()
    for peer in args.peers:
        if peer not in found:
            needs = PEERS[peer].requires
            print(f"{PEERS[peer].label} is left out: no module {needs} here.")
    records: dict[str, dict[str, Any]] = {}
    for name in args.cases:
        records[name] = run_case(name, found, limits, records)
    versions = sorted(set().union(*(r["versions"] for r in records.values())))
    minutes = (time.monotonic() - start) / 60
    print(f"\n{processor()}; {', '.join(versions)}; {minutes:.0f} minutes")
    print("Ours in seconds, and divided by the others:")
    print("\n".join(overview({n: r["summary"] for n, r in records.items()})))
    cases = {name: serialized(record) for name, record in records.items()}
    return {"processor": processor(), "versions": versions, "cases": cases}


def chosen(valid: dict[str, Any], text: str) -> list[str]:
    """The keys in a comma-separated list, in the order of `valid`."""
    keys = text.split(",")
    unknown = set(keys) - set(valid)
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{', '.join(sorted(unknown))}: expected some of {', '.join(valid)}"
        )
    return [key for key in valid if key in keys]


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        prog="bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", nargs="?", choices=["growth", "epoch"])
    parser.add_argument(
        "--cases", type=lambda text: chosen(CASES, text), default=[*CASES]
    )
    parser.add_argument(
        "--peers", type=lambda text: chosen(PEERS, text), default=[*PEERS]
    )
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds")
    parser.add_argument("--json", type=Path, help="file for every number")
    parser.add_argument(
        "--cap", type=float, default=30.0, help="seconds after which a peer is given up"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=20.0,
        help="seconds of counted calls after which a peer sits out further rounds",
    )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that workers are ended
    if args.what == "growth":
        everything = growth(args.rounds)
    else:
        everything = epoch() if args.what == "epoch" else bench(args)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()

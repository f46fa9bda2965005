"""Tables for the terminal, and the few numbers of a case that are worth quoting."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.fleet import Result
from bench.roster import TITLES, Case

NOTE_WIDTH = 90


def table(
    header: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1
) -> list[str]:
    """Aligned columns: the first `left` to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]

    def aligned(line: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return [aligned(header), rule, *map(aligned, lines)]


def digits(value: float | None, figures: int = 3) -> str:
    """Three figures without an exponent; "-" for None."""
    if value is None:
        return "-"
    return (
        f"{value:#.{figures}g}".rstrip(".") if 1e-4 < value < 999.5 else f"{value:.4g}"
    )


@dataclass(frozen=True)
class Summary:
    """A case in a few numbers; None where one cannot be had.

    Args:
        ours: Seconds of our kernel with a plan made before.
        best: The fastest rival.
        best_pytorch: The fastest rival on PyTorch.
        passes: Seconds of one forward and c activation-only backward passes.
        flops: Floating-point operations of the plan's contractions.
        flop_rate: Best rate of a square float32 product in the same rounds, per second.
        memory: Peak of ours, in bytes.
    """

    ours: float | None
    best: Result | None
    best_pytorch: Result | None
    passes: float | None
    flops: float | None
    flop_rate: float | None
    memory: int | None

    @property
    def floor(self) -> float | None:
        """Seconds below which a kernel of this plan cannot be had."""
        if self.passes is None or self.flops is None or self.flop_rate is None:
            return None
        return self.passes + self.flops / self.flop_rate

    def over(self, seconds: float | None) -> float | None:
        """Our seconds divided by these."""
        return self.ours / seconds if self.ours and seconds else None

    @property
    def ratios(self) -> dict[str, float | None]:
        """What the documentation quotes: below 1 is in our favour."""
        best, pytorch = self.best, self.best_pytorch
        memory = self.memory / pytorch.peak if self.memory and pytorch else None
        return {
            "best rival": self.over(best.seconds if best else None),
            "best PyTorch rival": self.over(pytorch.seconds if pytorch else None),
            "floor": self.over(self.floor),
            "memory of the best PyTorch rival": memory,
        }


def summarize(results: Mapping[str, Result]) -> Summary:
    """The numbers of a case that are worth quoting."""
    done = {key: r for key, r in results.items() if not r.reason}
    rivals = [r for r in done.values() if r.about.is_rival]
    pytorch = [r for r in rivals if r.about.kind == "pytorch"]
    ours, floor = done.get("ours"), done.get("floor")
    measured = floor.measured if floor else []
    ways = floor.facts["ways"] if floor else []
    return Summary(
        ours=ours.seconds if ours else None,
        best=min(rivals, key=lambda r: r.seconds, default=None),
        best_pytorch=min(pytorch, key=lambda r: r.seconds, default=None),
        passes=min(
            (statistics.median(m[way] for m in measured) for way in ways if measured),
            default=None,
        ),
        flops=ours.facts.get("flops") if ours else None,
        flop_rate=max(m["flop_rate"] for m in measured) if measured else None,
        memory=ours.peak if ours else None,
    )


def title(name: str, case: Case, parameters: int) -> str:
    """One line that says what is computed."""
    size = 4e-9 * case.n * case.outputs * parameters
    return (
        f"{name}: {TITLES[case.network]}, N = {case.n}, c = {case.outputs}, "
        f"p = {parameters:,} (dense Jacobian {size:.2g} GB)"
    )


def case_table(results: Mapping[str, Result], summary: Summary) -> list[str]:
    """A row for each peer."""
    header = [
        "peer",
        "seconds",
        "/ best rival",
        "/ floor",
        "memory MB",
        "error",
        "first call s",
        "calls",
    ]
    lines, notes = [], []
    for key, result in results.items():
        if key == "floor":
            continue
        if result.reason:
            lines.append([result.about.label, *["-"] * (len(header) - 1)])
            notes.append(f"  - {result.about.label}: {result.reason[:NOTE_WIDTH]}")
            continue
        full = result.about.outputs == "full"
        best = summary.best.seconds if summary.best and full else None
        floor = summary.floor if full else None
        lines.append(
            [
                result.about.label,
                digits(result.seconds),
                digits(result.seconds / best if best else None),
                digits(result.seconds / floor if floor else None),
                f"{result.peak / 1e6:.0f}",
                "-" if result.error is None else f"{result.error:.1e}",
                digits(result.first),
                str(len(result.times)) if result.times else "first",
            ]
        )
    return [*table(header, lines), *notes]


def verdict(results: Mapping[str, Result], summary: Summary) -> list[str]:
    """The ratios of a case in words; below 1 is in our favour."""
    names = {
        "best rival": summary.best,
        "best PyTorch rival": summary.best_pytorch,
        "memory of the best PyTorch rival": summary.best_pytorch,
    }
    lines = []
    for what, ratio in summary.ratios.items():
        who = names.get(what)
        if ratio is not None:
            tail = f" ({who.about.label})" if who else ""
            lines.append(f"  ours / {what}: {digits(ratio)}{tail}")
    if summary.passes is not None and summary.flop_rate is not None:
        flops = summary.flops / 1e9 if summary.flops else None
        rate = summary.flop_rate / 1e9
        lines.append(
            f"  floor {digits(summary.floor)} s: passes {digits(summary.passes)} s, "
            f"contraction {digits(flops)} GFLOP at {rate:.0f} GFLOP/s"
        )
    variants = [
        f"{r.about.label.removeprefix('ours, ')} {digits(r.seconds / summary.ours)}"
        for r in results.values()
        if r.about.kind == "variant" and not r.reason and summary.ours
    ]
    if variants:
        lines.append(f"  / ours: {', '.join(variants)}")
    wall = sum(r.wall for r in results.values())
    others = sum(r.others for r in results.values()) / wall if wall else 0.0
    if others > 0.1:
        busy = f"Other processes kept {others:.2f} cores busy meanwhile"
        lines.append(f"  {busy}: these times are too long.")
    return lines


def overview(summaries: Mapping[str, Summary]) -> list[str]:
    """A row for each case."""
    header = ["case", "ours s", "/ best rival", "/ best PyTorch", "/ floor", "memory"]
    header += ["best rival", "best PyTorch rival"]
    lines = []
    for name, summary in summaries.items():
        rivals = [
            r.about.label if r else "none ran"
            for r in (summary.best, summary.best_pytorch)
        ]
        ratios = [digits(ratio) for ratio in summary.ratios.values()]
        lines.append([name, digits(summary.ours), *ratios, *rivals])
    return table(header, lines)

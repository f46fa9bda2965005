"""The table a run ends with: each quantity at the first and the last measurement."""

from collections.abc import Iterable, Sequence
from typing import TypeAlias

History: TypeAlias = Sequence[tuple[int, dict[str, float]]]
"""(step, {tag: value}) in the order of measurement."""


def summary_table(histories: Iterable[History]) -> str:
    """First and last value of every quantity, one row each.

    Args:
        histories: One history per monitor; empty ones are left out.

    Returns:
        Plain text with the columns quantity, first, last and the two steps; a line that
        says so if nothing was measured.

    Example:
        >>> print(summary_table([[(0, {"ntk/trace": 2.0}), (9, {"ntk/trace": 3.0})]]))
        quantity    first (step)   last (step)
        ntk/trace          2 (0)         3 (9)
    """
    rows: list[tuple[str, str, str]] = []
    for history in histories:
        first: dict[str, tuple[int, float]] = {}
        last: dict[str, tuple[int, float]] = {}
        for step, scalars in history:
            for tag, value in scalars.items():
                first.setdefault(tag, (step, value))
                last[tag] = (step, value)
        rows += [(tag, _cell(*first[tag]), _cell(*last[tag])) for tag in first]
    if not rows:
        return "No measurement was taken."
    header = ("quantity", "first (step)", "last (step)")
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(3)]
    return "\n".join(
        f"{name:<{widths[0]}}   {left:>{widths[1]}}   {right:>{widths[2]}}".rstrip()
        for name, left, right in [header, *rows]
    )


def _cell(step: int, value: float) -> str:
    return f"{value:.4g} ({step})"

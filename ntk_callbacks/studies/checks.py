"""A number found in a study beside the published or derived one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """What a number must be.

    Args:
        value: It must lie within `tolerance` of this.
        tolerance: At least 0; with `value`.
        at_least: Or: not below this.
        at_most: Or: not above this.
        source: Where the expected number is from.

    Raises:
        ValueError: If nothing, or something contradictory, is expected.

    Example:
        >>> Check(value=-0.5, tolerance=0.1, source="Lee et al. 2019").expected
        '-0.5 ± 0.1'
    """

    value: float | None = None
    tolerance: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("value", "tolerance", "at_least", "at_most"):
            given = getattr(self, name)
            if not (given is None or isinstance(given, int | float)):
                raise ValueError(f"check: {name} is {given!r}, expected a number.")
        bounded = self.at_least is not None or self.at_most is not None
        if (self.value is None) != (self.tolerance is None):
            raise ValueError("check: value and tolerance belong together.")
        if bounded == (self.value is not None):
            raise ValueError(
                "check: expected value and tolerance, or at_least or at_most or both."
            )

    @property
    def expected(self) -> str:
        """What is expected, as text."""
        if self.value is not None:
            return f"{self.value:g} ± {self.tolerance:g}"
        if self.at_least is not None and self.at_most is not None:
            return f"{self.at_least:g} … {self.at_most:g}"
        if self.at_least is not None:
            return f"≥ {self.at_least:g}"
        return f"≤ {self.at_most:g}"

    def holds(self, number: float) -> bool:
        """Whether a number is what is expected; NaN never is."""
        if self.value is not None and self.tolerance is not None:
            return abs(number - self.value) <= self.tolerance
        low = -math.inf if self.at_least is None else self.at_least
        high = math.inf if self.at_most is None else self.at_most
        return low <= number <= high


@dataclass(frozen=True)
class Verdict:
    """A check and what was measured.

    Args:
        name: Of the number.
        measured: The number; NaN where the study did not find it.
        check: What it must be.
    """

    name: str
    measured: float
    check: Check

    @property
    def passed(self) -> bool:
        """Whether the number is what it must be."""
        return self.check.holds(self.measured)


def verdicts(
    numbers: Mapping[str, float], checks: Mapping[str, Check]
) -> list[Verdict]:
    """Every check beside its number.

    Args:
        numbers: What a study found.
        checks: By the names of numbers.

    Returns:
        In the order of the checks.

    Raises:
        ValueError: If a check names a number that the study does not find.
    """
    unknown = [name for name in checks if name not in numbers]
    if unknown:
        raise ValueError(
            f"check: the study finds no {', '.join(unknown)}; it finds "
            f"{', '.join(numbers)}."
        )
    return [Verdict(name, numbers[name], check) for name, check in checks.items()]


def verdict_lines(found: Sequence[Verdict]) -> list[str]:
    """One line for each verdict, in columns.

    Args:
        found: The verdicts.

    Returns:
        Lines of plain text, the first of which names the columns.
    """
    rows = [("checked", "measured", "expected", "", "source")]
    for verdict in found:
        word = "ok" if verdict.passed else "FAILED"
        measured = f"{verdict.measured:.4g}"
        source = verdict.check.source
        rows.append((verdict.name, measured, verdict.check.expected, word, source))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    sides = "<><<<"
    return [
        "  ".join(
            f"{cell:{side}{width}}"
            for cell, side, width in zip(row, sides, widths, strict=True)
        ).rstrip()
        for row in rows
    ]

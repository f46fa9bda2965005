"""Axes of a plot: which values they span, where they have ticks, how those read."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_DECADES = 100.0  # ratio of largest to smallest value from which an axis is logarithmic
_TINIEST, _LARGEST = 1e-300, 1e300  # beyond, sums and quotients leave float64
_STRETCHED: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "linear": np.asarray,
    "log": np.log10,
    "log1p": np.log1p,
}


@dataclass(frozen=True, slots=True)
class Axis:
    """A map from values to [0, 1], with ticks.

    Args:
        kind: `"linear"`, `"log"`, or `"log1p"` for steps, which begin with 0.
        low: Value at 0.
        high: Value at 1.
        ticks: Values and their labels.
        factor: What the labels are to be multiplied with, as text; mostly empty.
    """

    kind: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    factor: str = ""

    def position(self, value: float) -> float:
        """Where a value lies: 0 at or below the low end, 1 at or above the high one."""
        return float(self.positions(np.array(value)))

    def positions(self, values: NDArray[np.floating]) -> NDArray[np.floating]:
        """Where values lie, as `position` has it."""
        ends = np.array([self.low, self.high])
        low, high = _STRETCHED[self.kind](ends)
        inside = _STRETCHED[self.kind](values.clip(self.low, self.high))
        places: NDArray[np.floating] = (inside - low) / (high - low)
        return places


def value_axis(values: Sequence[float]) -> Axis:
    """An axis for measured values: logarithmic if they span two decades.

    Args:
        values: Finite numbers, at least one.

    Returns:
        An axis with three to seven ticks; a linear one starts at 0 where that costs
        little room.

    Example:
        >>> [label for _, label in value_axis([0.2, 1.0]).ticks]
        ['0.0', '0.2', '0.4', '0.6', '0.8', '1.0']
        >>> [label for _, label in value_axis([0.02, 3000.0]).ticks]
        ['10⁻¹', '10⁰', '10¹', '10²', '10³']
    """
    low, high = (_bounded(value) for value in (min(values), max(values)))
    if low > 0 and high >= _DECADES * low:
        bottom, top = math.log10(low), math.log10(high)
        margin = 0.03 * (top - bottom)
        low = 10.0 ** max(bottom - margin, -307.0)
        high = 10.0 ** min(top + margin, 308.0)
        return Axis("log", low, high, _decades(low, high))
    if 0 < low < 0.4 * high:
        low = 0.0
    if -low > -0.4 * high > 0 > high:
        high = 0.0
    span = high - low
    if span <= 1e-6 * max(abs(low), abs(high)):  # equal up to round-off of float32
        span = abs(high) or 1.0
        low, high = low - span / 2, high + span / 2
    low -= 0.04 * span if low else 0.0
    high += 0.04 * span if high else 0.0
    return _linear(low, high)


def step_axis(steps: Sequence[float]) -> Axis:
    """An axis for steps: logarithmic if most of them are early ones.

    Args:
        steps: Completed updates, at least one.

    Returns:
        An axis from the first to the last.

    Example:
        >>> step_axis([0, 1, 2, 5, 10, 22, 46, 100, 215]).kind
        'log1p'
        >>> [label for _, label in step_axis([0, 23, 46, 69, 92]).ticks]
        ['0', '20', '40', '60', '80']
    """
    ordered = sorted(steps)
    low, high = float(ordered[0]), float(ordered[-1])
    if high <= low:
        return _linear(low - 0.5, low + 0.5, whole=True)
    if len(set(ordered)) > 5 and ordered[len(ordered) // 2] * 8 < high:
        powers = [10**i for i in range(math.floor(math.log10(high)) + 1)]
        ticks = tuple((float(v), _count(v)) for v in [0, *powers] if v >= low)
        return Axis("log1p", low, high, ticks)
    return _linear(low, high, whole=True)


def number(value: float) -> str:
    """A number to be read: four digits, powers of ten where they are shorter.

    Args:
        value: Any number.

    Returns:
        Text such as `0.01234`, `1.234×10⁻⁷`, `∞` or `undefined`.

    Example:
        >>> number(0.000012345), number(float("nan")), number(9999.96)
        ('1.234×10⁻⁵', 'undefined', '10000')
    """
    if math.isnan(value):
        return "undefined"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value and not 1e-4 <= abs(value) < 1e6:
        digits, _, exponent = f"{value:.3e}".partition("e")
        digits = digits.rstrip("0").rstrip(".")
        return f"{digits}×{_power(int(exponent))}".replace("-", "−")
    # From 9999.5 on four digits would be written with an exponent.
    text = f"{value:.4g}" if abs(value) < 9999.5 else f"{value:.0f}"
    return text.replace("-", "−")


def _bounded(value: float) -> float:
    """An end of an axis; what lies beyond is drawn at its edge."""
    size = min(max(abs(value), _TINIEST), _LARGEST)
    return math.copysign(size, value) if value else 0.0


def _power(exponent: int) -> str:
    return "10" + str(exponent).translate(_SUPERSCRIPTS)


def _decades(low: float, high: float) -> tuple[tuple[float, str], ...]:
    first, last = math.floor(math.log10(low)), math.floor(math.log10(high))
    inside = range(first, last + 1)
    if len(inside) <= 4:  # too few to read a value off
        marks = [factor * 10.0**i for i in inside for factor in (1, 3)]
        return tuple((v, number(v)) for v in marks if low <= v <= high)
    every = -(-len(inside) // 7)
    chosen = [i for i in inside if i % every == 0 and 10.0**i >= low]
    return tuple((10.0**i, _power(i)) for i in chosen)


def _linear(low: float, high: float, whole: bool = False) -> Axis:
    """Ticks at multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough * 0.999)
    if whole:
        step = max(step, 1.0)
    exponent = math.floor(math.log10(max(abs(low), abs(high))))
    shift = 0 if whole or -4 < exponent < 5 else exponent
    decimals = max(0, shift - math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    ticks = []
    for i in range(first, last + 1):
        shown = i * step / 10.0**shift
        label = _count(round(shown)) if whole else f"{shown:.{decimals}f}"
        ticks.append((i * step, label.replace("-", "−")))
    return Axis("linear", low, high, tuple(ticks), f"×{_power(shift)}" if shift else "")


def _count(value: int) -> str:
    for size, letter in ((10**6, "M"), (10**3, "k")):
        if value >= 10 * size or (value >= size and value % size == 0):
            return f"{value / size:g}{letter}"
    return str(value)

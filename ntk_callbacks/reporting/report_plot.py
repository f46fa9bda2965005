"""Curves as one SVG that a page holds as it is: no script, no font, no address."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from ntk_callbacks.reporting.report_axis import Axis, number, step_axis, value_axis

COLORS = 8
"""Curves beyond these repeat the colors, dashed otherwise."""

_WIDTH, _HEIGHT = 440, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 36, 44
_MOST_POINTS = 1200  # of a path: more than there are pixels
_MOST_MARKS = 30
_DASHES = ("", "6 3", "2 3", "9 3 2 3")


@dataclass(frozen=True, slots=True)
class Curve:
    """What is drawn in one color.

    Args:
        run: Index of the run, which decides on the color.
        label: What the marks say when pointed at.
        x: Positions, increasing.
        y: Values; those that are not finite leave a gap.
        faint: Thin and dashed, for the first of two spectra.
    """

    run: int
    label: str
    x: Sequence[float]
    y: Sequence[float]
    faint: bool = False


@dataclass(frozen=True, slots=True)
class Labels:
    """The words of a plot.

    Args:
        title: Read out by screen readers, as is the description.
        description: What is drawn, in a sentence.
        x: Quantity and unit along the horizontal axis.
        y: Quantity and unit along the vertical axis.
    """

    title: str
    description: str
    x: str
    y: str


def line_plot(curves: Sequence[Curve], labels: Labels, key: str) -> str:
    """An SVG of curves over a common pair of axes.

    Args:
        curves: What to draw; a value that is not finite leaves a gap.
        labels: Title and axes; any text, it is escaped.
        key: Letters and digits, unique on the page: names the title for `aria`.

    Returns:
        An `<svg>` element, colored by the style sheet of the page.

    Example:
        >>> curve = Curve(0, "run", [0, 10], [1.0, 2.0])
        >>> svg = line_plot([curve], Labels("trace", "a curve", "updates", "Σλ"), "p1")
        >>> svg.count("<circle"), "<title" in svg
        (2, True)
    """
    seen = [y for curve in curves for y in curve.y if math.isfinite(y)]
    body = _text(_WIDTH / 2, _HEIGHT / 2, "no finite value yet", "middle")
    if seen:
        x = step_axis([x for curve in curves for x in curve.x])
        y = value_axis(seen)
        body = "".join(
            [
                _grid(x, y),
                _text(8, 16, labels.y, "start", "label"),
                _text(_LEFT - 6, _TOP - 4, y.factor, "end") if y.factor else "",
                _text(_WIDTH - _RIGHT, _HEIGHT - 8, labels.x, "end", "label"),
                *(_drawn(curve, x, y) for curve in curves),
            ]
        )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-labelledby="{key}t {key}d">'
        f'<title id="{key}t">{escape(labels.title)}</title>'
        f'<desc id="{key}d">{escape(labels.description)}</desc>{body}</svg>'
    )


def _grid(x: Axis, y: Axis) -> str:
    parts = []
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    for value, label in y.ticks:
        row = float(_row(y, np.array(value)))
        parts.append(f'<path class="grid" d="M{_LEFT} {row:.1f}H{right}"/>')
        parts.append(_text(_LEFT - 6, row + 4, label, "end"))
    for value, label in x.ticks:
        column = float(_column(x, np.array(value)))
        parts.append(f'<path class="tick" d="M{column:.1f} {bottom}v4"/>')
        parts.append(_text(column, bottom + 17, label, "middle"))
    parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>')
    return "".join(parts)


def _drawn(curve: Curve, x: Axis, y: Axis) -> str:
    points = _thinned([*zip(curve.x, curve.y, strict=True)])
    color = f"run{curve.run % COLORS}"
    dash = "2 2" if curve.faint else _DASHES[curve.run // COLORS % len(_DASHES)]
    style = f' stroke-dasharray="{dash}"' if dash else ""
    columns = _column(x, np.array([step for step, _ in points]))
    rows = _row(y, np.array([value for _, value in points]))
    path, pen_up = [], True
    finite = []
    for (step, value), column, row in zip(points, columns, rows, strict=True):
        if math.isfinite(value):
            path.append(f"{'M' if pen_up else 'L'}{column:.1f} {row:.1f}")
            finite.append((step, value, column, row))
        pen_up = not math.isfinite(value)
    kind = f"{color} faint" if curve.faint else color
    line = f'<path class="{kind}" d="{"".join(path)}"{style}/>'
    if curve.faint:
        return line
    every = -(-len(finite) // _MOST_MARKS) or 1
    marks = []
    for step, value, column, row in finite[::-1][::every]:  # the last one always
        said = escape(f"{curve.label}: {number(value)} at {step:.0f}")
        marks.append(
            f'<circle class="{color}" cx="{column:.1f}" cy="{row:.1f}" r="2.4">'
            f"<title>{said}</title></circle>"
        )
    return line + "".join(marks)


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most so many points, with the smallest and largest of those left out."""
    if len(points) <= _MOST_POINTS:
        return points
    size = -(-len(points) // (_MOST_POINTS // 2))
    kept = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        finite = [point for point in bucket if math.isfinite(point[1])] or bucket[:1]
        ends = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _column(x: Axis, values: NDArray[np.floating]) -> NDArray[np.floating]:
    return _LEFT + x.positions(values) * (_WIDTH - _LEFT - _RIGHT)


def _row(y: Axis, values: NDArray[np.floating]) -> NDArray[np.floating]:
    return _HEIGHT - _BOTTOM - y.positions(values) * (_HEIGHT - _TOP - _BOTTOM)


def _text(x: float, y: float, words: str, anchor: str, kind: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f"<text {place}{kind}>{escape(words)}</text>"

"""Spectra over the steps of a run: how many values lie where, and when."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ntk_callbacks.reporting.report_axis import Axis, step_axis, value_axis


@dataclass(frozen=True, eq=False)
class Density:
    """Counts on a grid of values and steps.

    Args:
        counts: (rows, columns), the largest values in the first row, the first step in
            the first column.
        steps: Axis of the columns.
        values: Axis of the rows.
    """

    counts: NDArray[np.int64]
    steps: Axis
    values: Axis


def spectral_densities(
    steps: Sequence[int],
    logarithms: Sequence[NDArray[np.floating]],
    rows: int = 120,
    columns: int = 360,
) -> Density:
    """Where the values of a spectrum lie, from measurement to measurement.

    A column shows the latest measurement up to its step, the last column the last one.

    Args:
        steps: Of the measurements, increasing.
        logarithms: log10 of the values of each; those that are not finite count
            nowhere.
        rows: Bins of the values, equal on their axis.
        columns: Bins of the steps, equal on theirs.

    Returns:
        The counts and the axes.

    Raises:
        ValueError: If no value is finite, or the lengths differ.

    Example:
        >>> spectra = [np.array([0.0, 3.0]), np.array([0.0, 0.0])]
        >>> spectral_densities([0, 10], spectra, rows=2, columns=3).counts
        array([[1, 1, 0],
               [1, 1, 2]])
    """
    if len(steps) != len(logarithms):
        raise ValueError(
            f"spectral_densities: {len(steps)} steps, but {len(logarithms)} spectra."
        )
    # What float64 does not hold is drawn at the edge.
    finite = [s[np.isfinite(s)].astype(np.float64).clip(-300, 300) for s in logarithms]
    seen = [float(end) for s in finite if len(s) for end in (s.min(), s.max())]
    if not seen:
        raise ValueError("spectral_densities: no value of any spectrum is finite.")
    values, across = value_axis([10.0**end for end in seen]), step_axis(steps)
    bins = []
    for spectrum in finite:
        inside = values.positions(10.0**spectrum)
        below = np.minimum((inside * rows).astype(np.int64), rows - 1)
        bins.append(np.bincount(below, minlength=rows)[::-1])
    positions = across.positions(np.array(steps, dtype=np.float64))
    # A measurement at the left end of a column, up to round-off, counts in it; the last
    # column shows the last measurement.
    starts = np.arange(columns) / columns + 1e-9
    starts[-1] = 1.0
    latest = np.searchsorted(positions, starts, side="right") - 1
    counts = np.stack(bins, axis=1)[:, latest.clip(min=0)]
    return Density(counts, across, values)

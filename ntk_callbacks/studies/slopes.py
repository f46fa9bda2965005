"""Averages over jobs, and powers in the size of a network."""

import math
from collections.abc import Mapping

import numpy as np

from ntk_callbacks.studies.study import Results


def mean_by(results: Results, key: str, value: str) -> dict[float, float]:
    """Mean of a result over all jobs that share a parameter.

    Args:
        results: Of all jobs.
        key: The parameter, a number.
        value: The result.

    Returns:
        Parameter -> mean, in the order of the parameter.

    Example:
        >>> jobs = {"a": {"n": 2, "s": 1.0}, "b": {"n": 2, "s": 3.0}}
        >>> mean_by(jobs, "n", "s")
        {2: 2.0}
    """
    found: dict[float, list[float]] = {}
    for result in results.values():
        found.setdefault(result[key], []).append(result[value])
    return {k: sum(found[k]) / len(found[k]) for k in sorted(found)}


def log_log_slope(values: Mapping[float, float]) -> float:
    """The power a of y ≈ C xᵃ, by least squares in logarithms.

    Args:
        values: x -> y, both positive.

    Returns:
        a; NaN for fewer than two x or where a y is not positive.

    Example:
        >>> round(log_log_slope({1: 8.0, 2: 4.0, 4: 2.0}), 12)
        -1.0
    """
    if len(values) < 2 or not all(y > 0 and math.isfinite(y) for y in values.values()):
        return math.nan
    x, y = np.log([*values]), np.log([*values.values()])
    return float(np.polyfit(x, y, 1)[0])

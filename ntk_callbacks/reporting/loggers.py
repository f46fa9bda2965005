"""Hand a measurement to whatever loggers a trainer has."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ntk_callbacks.record import Measurement
from ntk_callbacks.reporting.images import heat_map


def report(
    measurement: Measurement, loggers: Iterable[Any]
) -> list[tuple[str, Exception]]:
    """Scalars to every logger; histograms and images to those that draw them.

    Args:
        measurement: Logged at its own step, straight to the logger: `self.log` would
            repeat it on later steps and shift it by one.
        loggers: Objects with `log_metrics(metrics, step)`.

    Returns:
        Name of each logger that raised, and what it raised.
    """
    failures = []
    for logger in loggers:
        try:
            logger.log_metrics(dict(measurement.scalars), step=measurement.step)
            _draw(measurement, getattr(logger, "experiment", None))
        except Exception as error:  # a logger may raise anything; the others go on
            failures.append((type(logger).__name__, error))
    return failures


def _draw(measurement: Measurement, writer: Any) -> None:
    """Histograms and images, if the logger writes for TensorBoard."""
    if not (hasattr(writer, "add_histogram") and hasattr(writer, "add_image")):
        return
    for tag, vector in measurement.vectors.items():
        finite = _finite(vector)
        if len(finite):
            writer.add_histogram(tag, finite, measurement.step, bins=_edges(finite))
    for tag, matrix in measurement.matrices.items():
        if len(_finite(matrix)):
            writer.add_image(tag, heat_map(matrix), measurement.step)


def _finite(values: Tensor) -> Tensor:
    values = values.detach().cpu().double()
    return values[torch.isfinite(values)]


def _edges(values: Tensor, bins: int = 100) -> list[float]:
    """Equal bins; those of TensorBoard widen with |value| and blur both ends."""
    low, high = (float(value) for value in values.aminmax())
    margin = 1e-6 * (max(abs(low), abs(high)) or 1.0)  # for values that are all equal
    edges = torch.linspace(low - margin, high + margin, bins + 1, dtype=torch.float64)
    return [float(edge) for edge in edges]

"""Hand a measurement to whatever loggers a trainer has."""

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
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
        Name of each logger that raised, and what it raised. The others go on; so do
        the other pictures, if it took the scalars.
    """
    failures: list[tuple[str, Exception]] = []
    for name, logger in named(loggers):
        try:
            logger.log_metrics(dict(measurement.scalars), step=measurement.step)
            drawings = _drawings(measurement, getattr(logger, "experiment", None))
        except Exception as error:  # a logger may raise anything; the others go on
            failures.append((name, error))
        else:
            failures += [(name, error) for error in attempted(drawings)]
    return failures


def named(loggers: Iterable[Any]) -> list[tuple[str, Any]]:
    """Loggers by their types; several of one type are counted.

    Args:
        loggers: Those of a trainer.

    Returns:
        (name, logger) of each, the names different.

    Example:
        >>> [name for name, _ in named([1, "a", 2])]
        ['int', 'str', 'int (2)']
    """
    count = Counter[str]()
    found = []
    for logger in loggers:
        kind = type(logger).__name__
        count[kind] += 1
        found.append((f"{kind} ({count[kind]})" if count[kind] > 1 else kind, logger))
    return found


def attempted(calls: Iterable[Callable[[], object]]) -> list[Exception]:
    """Make every call, whatever others raise.

    Args:
        calls: Functions without arguments.

    Returns:
        What was raised.
    """
    errors: list[Exception] = []
    for call in calls:
        try:
            call()
        except Exception as error:  # a logger may raise anything
            errors.append(error)
    return errors


def _drawings(measurement: Measurement, writer: Any) -> list[Callable[[], object]]:
    """Histograms and images, if the logger writes for TensorBoard."""
    if not (hasattr(writer, "add_histogram") and hasattr(writer, "add_image")):
        return []
    histograms, images = measurement.vectors.items(), measurement.matrices.items()
    return [
        *(partial(_histogram, writer, measurement.step, *item) for item in histograms),
        *(partial(_image, writer, measurement.step, *item) for item in images),
    ]


def _histogram(writer: Any, step: int, tag: str, vector: Tensor) -> None:
    if len(finite := _finite(vector)):
        writer.add_histogram(tag, finite, step, bins=_edges(finite))


def _image(writer: Any, step: int, tag: str, matrix: Tensor) -> None:
    if len(_finite(matrix)):
        writer.add_image(tag, heat_map(matrix), step)


def _finite(values: Tensor) -> Tensor:
    values = values.detach().cpu().double()
    return values[torch.isfinite(values)]


def _edges(values: Tensor, bins: int = 100) -> list[float]:
    """Equal bins; those of TensorBoard widen with |value| and blur both ends."""
    low, high = (float(value) for value in values.aminmax())
    margin = 1e-6 * (max(abs(low), abs(high)) or 1.0)  # for values that are all equal
    edges = torch.linspace(low - margin, high + margin, bins + 1, dtype=torch.float64)
    return [float(edge) for edge in edges]

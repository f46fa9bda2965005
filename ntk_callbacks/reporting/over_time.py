"""Spectra over the steps of a run as one image, drawn when the run ends.

Drawn from the history, which a resumed run continues: interrupted or not, a run ends
with the same image.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ntk_callbacks.reporting.density import Density, spectral_densities
from ntk_callbacks.reporting.history import RunHistory
from ntk_callbacks.reporting.image_text import write
from ntk_callbacks.reporting.images import heat_map
from ntk_callbacks.reporting.loggers import attempted, named
from ntk_callbacks.reporting.report_axis import Axis

LOGARITHMS = "_log10"
"""What the tags of spectra end with."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 8, 22


def draw_over_time(
    history: RunHistory, tags: Iterable[str], loggers: Iterable[Any]
) -> list[tuple[str, Exception]]:
    """Log an image of every spectrum, `<tag>_over_time`, at its last step.

    Args:
        history: Of the run so far.
        tags: Spectra; one that has no finite value is left out.
        loggers: Those that do not write for TensorBoard are left alone.

    Returns:
        Name of each logger that raised, and what it raised.
    """
    failures: list[tuple[str, Exception]] = []
    writers = []
    for name, logger in named(loggers):
        try:
            writer: Any = getattr(logger, "experiment", None)
            writers += [(name, writer)] if hasattr(writer, "add_image") else []
        except Exception as error:  # a logger may raise anything; the others go on
            failures.append((name, error))
    for tag in tags if writers else ():
        series = history[tag]
        try:
            density = spectral_densities([*map(int, series.steps)], series.values)
        except ValueError:
            continue
        image, step = density_image(density), int(series.steps[-1])
        for name, writer in writers:
            draw = partial(writer.add_image, f"{tag}_over_time", image, step)
            failures += [(name, error) for error in attempted([draw])]
    return failures


def colored(density: Density, magnify: int = 1) -> Tensor:
    """The grid as an image: no value dark, few blue, many yellow.

    Args:
        density: Counts; colored by their logarithm.
        magnify: Side of a bin in pixels.

    Returns:
        (3, height, width) of uint8.
    """
    counts = torch.tensor(density.counts).double().log1p()
    image = heat_map(counts, min_side=1, max_side=max(counts.shape))
    return image.repeat_interleave(magnify, 1).repeat_interleave(magnify, 2)


def density_image(density: Density, magnify: int = 2) -> Tensor:
    """The grid with numbers at its axes: steps to the right, values upward.

    Args:
        density: What to draw.
        magnify: Side of a bin in pixels.

    Returns:
        (3, height, width) of uint8, on white.
    """
    grid = colored(density, magnify)
    _, height, width = grid.shape
    size = (3, height + _TOP + _BOTTOM, width + _LEFT + _RIGHT)
    image = torch.full(size, 255, dtype=torch.uint8)
    image[:, _TOP : _TOP + height, _LEFT : _LEFT + width] = grid
    for value, word in _words(density.values):
        row = _TOP + round((1 - density.values.position(value)) * (height - 1))
        image[:, row, _LEFT - 6 : _LEFT] = 0
        write(image, word, row - 5, _LEFT - 8 - 8 * len(word))
    for value, word in _words(density.steps):
        column = _LEFT + round(density.steps.position(value) * (width - 1))
        image[:, _TOP + height : _TOP + height + 5, column] = 0
        write(image, word, _TOP + height + 8, column - 4 * len(word))
    return image


def _words(axis: Axis) -> list[tuple[float, str]]:
    """Ticks and their values in the characters that there are: 0.3, 250, 1e-5."""
    words = []
    for value, _ in axis.ticks:
        word = f"{value:.3g}".replace("e+0", "e").replace("e-0", "e-")
        words.append((value, word.replace("e+", "e")))
    return words

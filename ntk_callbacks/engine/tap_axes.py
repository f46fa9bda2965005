"""Where the examples lie in what comes out of the taps."""

from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import TypeAlias

import torch
from torch import Tensor

from ntk_callbacks._types import Inputs, Params
from ntk_callbacks.engine.batch_axis import BatchAxis, located, telling_count
from ntk_callbacks.engine.recording import Recording, record
from ntk_callbacks.engine.taps import Tap
from ntk_callbacks.functional import ModelFunction
from ntk_callbacks.nested import batch_size, map_tensors

Axes: TypeAlias = list[BatchAxis | str | None]
"""For each tap its batch axis, None if nothing depends on it, or what is wrong."""

_NOWHERE = "its use has no axis that the examples run along"


def axes_of_taps(
    function: ModelFunction, params: Params, x: Inputs, recording: Recording
) -> tuple[Sequence[Tensor | None], Axes]:
    """Gradients at the taps of a recording, and their batch axes.

    Args:
        function: The model, whose examples do not depend on one another.
        params: Values of its parameters.
        x: The batch that was recorded.
        recording: Its taps.

    Returns:
        For each tap a gradient, None if it is not known; and its batch axis.
    """
    reached, axes = _axes(recording, batch_size(x))
    if not recording.outputs.is_meta:
        axes = _certain(function, params, x, recording, axes)
    return reached, axes


def _axes(recording: Recording, n: int) -> tuple[Sequence[Tensor | None], Axes]:
    """Gradients at the taps, and the axes that fit them."""
    taps, outputs = recording.taps, recording.outputs
    unknown = [None for _ in taps]
    if outputs.is_meta:
        return unknown, [BatchAxis(0) for _ in taps]
    if not (taps and outputs.requires_grad):
        return unknown, [None for _ in taps]
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(outputs.shape, generator=generator).to(outputs)
    edges = [tap.edge for tap in taps]
    parts = [
        torch.autograd.grad(
            example @ direction, edges, retain_graph=True, allow_unused=True
        )
        for example, direction in zip(outputs, directions, strict=True)
    ]
    reached: list[Tensor | None] = []
    axes: Axes = []
    for own in zip(*parts, strict=True):
        some = [gradient for gradient in own if gradient is not None]
        reached.append(torch.stack(some).sum(0) if some else None)
        told = located(some) if len(some) == len(own) else None
        axes.append((told or _NOWHERE) if some else None)
    return reached, _as_others(taps, axes)


def _as_others(taps: list[Tap], axes: Axes) -> Axes:
    """The axes; those of a recurrent layer are the same at all steps."""
    # What reads the last output of a layer that goes backwards depends on one step, and
    # gradients by the first of many steps may vanish: such taps tell nothing.
    kinds = [
        (tap.part_of, tap.function, tap.shape, frozenset(map(id, tap.sources.values())))
        for tap in taps
    ]
    known = {
        kind: axis
        for kind, axis in zip(kinds, axes, strict=True)
        if isinstance(axis, BatchAxis) and kind[0] is not None
    }
    return [
        known.get(kind, axis) if isinstance(axis, str) else axis
        for kind, axis in zip(kinds, axes, strict=True)
    ]


def _certain(
    function: ModelFunction, params: Params, x: Inputs, recording: Recording, axes: Axes
) -> Axes:
    """The batch axes of taps, from more examples where two do not tell them."""
    n = m = batch_size(x)
    taps, names = recording.taps, list(recording.parameters)
    while (needed := telling_count(_held(taps, axes, m))) > m:
        m = needed
        chosen = [i % 2 * (n - 1) for i in range(m)]
        repeated: Inputs = map_tensors(itemgetter(chosen), x)
        again = record(function, params, repeated, names)
        if len(again.taps) != len(taps):
            return ["its uses depend on the number of examples"] * len(taps)
        taps, (_, axes) = again.taps, _axes(again, m)
    return axes


def _held(taps: list[Tap], axes: Axes, n: int) -> Iterator[tuple[BatchAxis, int]]:
    """The batch axes, and how many entries they hold of each of n examples."""
    for tap, axis in zip(taps, axes, strict=True):
        if isinstance(axis, BatchAxis):
            yield axis, tap.shape[axis.axis] // n

"""How the rows of J follow from a tap: a table of rules, one for each function.

A rule has the arguments of its torch function after the `Call`, and returns what is
known of each parameter among them, by `id`. It raises a LookupError where it does not
apply. That a rule is right for a model is not assumed: the audit proves it.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - as torch calls it

from ntk_callbacks.engine.batch_axis import BatchAxis
from ntk_callbacks.engine.broadcast import add, cat, mul, pointwise, prelu, sub
from ntk_callbacks.engine.convolution import convolution, transposed_convolution
from ntk_callbacks.engine.factors import Call, Direct, Lookup, Use, unexpanded
from ntk_callbacks.engine.matrices import addmm, linear, matmul
from ntk_callbacks.engine.normalizations import (
    batch_norm,
    group_norm,
    instance_norm,
    layer_norm,
    rms_norm,
)
from ntk_callbacks.engine.taps import Tap
from ntk_callbacks.nested import leaves, map_tensors

Rule: TypeAlias = Callable[..., dict[int, Use]]
"""`(call, *args, **kwargs of the torch function)` -> `{id of a parameter: its use}`."""


def embedding(
    call: Call,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> dict[int, Use]:
    """`F.embedding`."""
    call.expect(max_norm is None, "max_norm rewrites the table")
    call.expect(not scale_grad_by_freq, "gradients depend on the batch")
    v, c = weight.shape
    ids = input
    if padding_idx is not None:
        ids = torch.where(ids == padding_idx % v, -1, ids)
    ids = call.first(ids).reshape(call.n, -1)

    def right(gradient: Tensor) -> Tensor:
        return call.first(gradient).reshape(call.n, -1, c)

    return {id(weight): Lookup(ids, right, (v, c))}


def getitem(call: Call, input: Tensor, index: Any) -> dict[int, Use]:
    """`table[ids]`."""
    call.expect(call.is_parameter(input) and input.ndim == 2, "no table")
    call.expect(isinstance(index, Tensor) and index.dtype == torch.long, "no ids")
    return embedding(call, torch.where(index < 0, index + len(input), index), input)


def taken_apart(tap: Tap, axis: BatchAxis) -> tuple[bool, ...]:
    """Which arguments of a tap `local` takes apart into those of single examples.

    Args:
        tap: The call.
        axis: Batch axis of its output.

    Returns:
        For each tensor among the arguments, whether it is computed from the inputs and
        as long along that axis as the output.
    """
    return tuple(
        id(tensor) in tap.data and _as_long(tensor, tap, axis)
        for tensor in (*leaves(tap.args), *leaves(tap.kwargs))
    )


def _as_long(tensor: Tensor, tap: Tap, axis: BatchAxis) -> bool:
    i = axis.axis
    return tensor.ndim > i and tensor.shape[i] == tap.shape[i]


def local(call: Call, *args: Any, **kwargs: Any) -> dict[int, Use]:
    """Any function: run again for each example, with parameters of its own."""
    n, axis, shape = call.n, call.axis, call.tap.shape
    outputs: list[Tensor] = []
    copies: dict[int, list[Tensor]] = {key: [] for key in call.tap.sources}

    def of_example(tensor: Tensor, i: int) -> Tensor:
        as_long = _as_long(tensor, call.tap, axis)
        if id(tensor) in copies:
            own = unexpanded(tensor).clone().requires_grad_()
            copies[id(tensor)].append(own)
            sizes = list(tensor.shape)
            if as_long and own.shape[axis.axis] == 1:  # expanded to the batch
                sizes[axis.axis] //= n
            return own.expand(sizes)
        if as_long and id(tensor) in call.tap.data:
            return axis.example(tensor, n, i).clone()
        return tensor

    with torch.enable_grad():
        for i in range(n):
            own = partial(of_example, i=i)
            given = map_tensors(own, args), map_tensors(own, kwargs)
            outputs.append(call.tap.function(*given[0], **given[1]))
    work = math.prod(shape) // n

    depends = [i for i in range(n) if outputs[i].requires_grad]  # not only on a dtype

    def rows(gradient: Tensor, own: list[Tensor]) -> Tensor:
        if not depends:
            return torch.zeros_like(torch.stack(own).detach())
        found = torch.autograd.grad(
            [outputs[i] for i in depends],
            own,
            [axis.example(gradient, n, i) for i in depends],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return torch.stack([g.to_dense() for g in found])

    return {
        key: Direct(partial(rows, own=own), own[0].numel(), work, derived=True)
        for key, own in copies.items()
    }


RULES: dict[Callable[..., Any], Rule] = {
    F.linear: linear,
    torch.addmm: addmm,
    Tensor.addmm: addmm,
    torch.matmul: matmul,
    torch.mm: matmul,
    torch.mv: matmul,
    Tensor.matmul: matmul,
    Tensor.mm: matmul,
    Tensor.mv: matmul,
    F.conv1d: convolution,
    F.conv2d: convolution,
    F.conv3d: convolution,
    F.conv_transpose1d: transposed_convolution,
    F.conv_transpose2d: transposed_convolution,
    F.conv_transpose3d: transposed_convolution,
    F.embedding: embedding,
    Tensor.__getitem__: getitem,
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    F.group_norm: group_norm,
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    F.prelu: prelu,
    torch.cat: cat,
    torch.add: add,
    Tensor.add: add,
    Tensor.add_: add,
    torch.sub: sub,
    Tensor.sub: sub,
    Tensor.sub_: sub,
    torch.mul: mul,
    Tensor.mul: mul,
    Tensor.mul_: mul,
    torch.div: partial(pointwise, function=torch.div),
    Tensor.div: partial(pointwise, function=torch.div),
    Tensor.div_: partial(pointwise, function=torch.div),
    torch.where: partial(pointwise, function=torch.where),
    torch.addcmul: partial(pointwise, function=torch.addcmul),
    Tensor.addcmul: partial(pointwise, function=torch.addcmul),
    torch.lerp: partial(pointwise, function=torch.lerp),
    Tensor.lerp: partial(pointwise, function=torch.lerp),
    torch.pow: partial(pointwise, function=torch.pow),
    Tensor.pow: partial(pointwise, function=torch.pow),
    torch.maximum: partial(pointwise, function=torch.maximum),
    torch.minimum: partial(pointwise, function=torch.minimum),
}
"""Torch function -> its rule; a function that is not here goes to `local`."""

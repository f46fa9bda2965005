"""Rules of parameters that are broadcast: one for each channel, token or entry."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ntk_callbacks.engine.factors import Call, Direct, Use, unexpanded
from ntk_callbacks.nested import map_tensors


def channels(
    call: Call, p: Tensor, axis: int, factor: Tensor | None, *, bias: bool = False
) -> Direct:
    """A vector along one axis of the output: ∂f/∂p = Σ g·factor.

    Args:
        call: The call.
        p: The vector.
        axis: The axis.
        factor: Of the shape of the output; None for 1.
        bias: Whether it is the bias of a matrix.

    Returns:
        What is known of it.
    """
    call.expect(call.axis.axis != axis, "the examples are channels")
    aligned = p.reshape([-1 if i == axis else 1 for i in range(len(call.tap.shape))])

    def rows(gradient: Tensor) -> Tensor:
        values = gradient if factor is None else gradient * factor
        return summed(call, values, aligned).reshape(call.n, *p.shape)

    return Direct(rows, p.numel(), math.prod(call.tap.shape) // call.n, bias)


def summed(call: Call, values: Tensor, p: Tensor) -> Tensor:
    """Σ of `values` over the positions of each example that share an entry of p.

    Args:
        call: The call whose output `values` are by.
        values: Of the shape of the output.
        p: A parameter that is broadcast to that shape.

    Returns:
        `(n, *shape of p without its repetitions)`.
    """
    p = unexpanded(p)
    shape = (1,) * (values.ndim - p.ndim) + tuple(p.shape)
    call.expect(shape[call.axis.axis] == 1, "a parameter for each example")
    parts = call.first(values)
    rest = shape[: call.axis.axis] + shape[call.axis.axis + 1 :]
    axes = [i for i, size in enumerate(rest, 2) if size == 1 and parts.shape[i] > 1]
    if parts.shape[1] > 1:
        axes = [1, *axes]
    total = parts.sum(axes) if axes else parts
    return total.reshape(call.n, *p.shape)


def broadcast(
    call: Call,
    p: Tensor,
    values: Callable[[Tensor], Tensor],
    *,
    derived: bool = False,
) -> dict[int, Use]:
    """A parameter that is broadcast to the output.

    Args:
        call: The call.
        p: The parameter.
        values: The gradient by the output -> the gradient by p as if it had its shape.
        derived: Whether that takes derivatives.

    Returns:
        What is known of it, by its `id`.
    """
    call.expect(p.ndim <= len(call.tap.shape), "the output has fewer axes")
    work = math.prod(call.tap.shape) // call.n

    def rows(gradient: Tensor) -> Tensor:
        return summed(call, values(gradient), p)

    return {id(p): Direct(rows, unexpanded(p).numel(), work, derived=derived)}


def add(
    call: Call, input: Tensor, other: Tensor, *, alpha: float = 1
) -> dict[int, Use]:
    """`x + αp` and `p + αx`."""
    if call.is_parameter(other):
        call.expect(not call.is_parameter(input), "both sides are parameters")
        return broadcast(call, other, lambda g: g if alpha == 1 else alpha * g)
    return broadcast(call, input, lambda g: g)


def sub(
    call: Call, input: Tensor, other: Tensor, *, alpha: float = 1
) -> dict[int, Use]:
    """`x − αp` and `p − αx`."""
    return add(call, input, other, alpha=-alpha)


def mul(call: Call, input: Tensor, other: Tensor) -> dict[int, Use]:
    """`x·p` and `p·x`."""
    p, x = (other, input) if call.is_parameter(other) else (input, other)
    call.expect(not call.is_parameter(x), "both sides are parameters")
    return broadcast(call, p, lambda g: g * x)


def pointwise(
    call: Call, *args: Any, function: Callable[..., Tensor], **kwargs: Any
) -> dict[int, Use]:
    """Any function of corresponding entries: each p as if it were never broadcast."""
    shape = call.tap.shape
    uses: dict[int, Use] = {}
    for key in call.tap.sources:
        own: list[Tensor] = []

        def unshared(tensor: Tensor, key: int = key, own: list[Tensor] = own) -> Tensor:
            if id(tensor) != key:
                return tensor
            own.extend([tensor, tensor.expand(shape).clone().requires_grad_()])
            return own[1]

        given = map_tensors(unshared, args), map_tensors(unshared, kwargs)
        with torch.enable_grad():
            y = function(*given[0], **given[1])
        p, copy = own

        def values(g: Tensor, y: Tensor = y, copy: Tensor = copy) -> Tensor:
            return torch.autograd.grad(y, copy, g, retain_graph=True)[0]

        uses |= broadcast(call, p, values, derived=True)
    return uses


def prelu(call: Call, input: Tensor, weight: Tensor) -> dict[int, Use]:
    """One slope, or one for each channel."""
    call.expect(not call.is_parameter(input), "the input is a parameter")
    axis = min(1, input.ndim - 1)
    shape = [-1 if i == axis else 1 for i in range(input.ndim)]
    negative = input.clamp(max=0)
    if weight.numel() > 1:
        return {id(weight): channels(call, weight, axis, negative)}
    aligned = weight.reshape(shape)

    def rows(gradient: Tensor) -> Tensor:
        whole = summed(call, gradient * negative, aligned)
        return whole.reshape(call.n, *weight.shape)

    return {id(weight): Direct(rows, 1, math.prod(call.tap.shape) // call.n)}


def cat(
    call: Call, tensors: Any, dim: int = 0, *, axis: int | None = None
) -> dict[int, Use]:
    """Tokens and the like put before or behind the data."""
    dim = (dim if axis is None else axis) % len(call.tap.shape)
    call.expect(dim != call.axis.axis, "parameters beside the examples")
    uses: dict[int, Use] = {}
    start = 0
    for tensor in tensors:
        size = tensor.shape[dim]
        if call.is_parameter(tensor):
            place = partial(Tensor.narrow, dim=dim, start=start, length=size)
            uses |= broadcast(call, tensor, place)
        start += size
    return uses

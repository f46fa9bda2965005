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

from ntk_callbacks.engine.convolution import convolution, transposed_convolution
from ntk_callbacks.engine.factors import Call, Direct, Lookup, Outer, Use, unexpanded
from ntk_callbacks.nested import map_tensors

Rule: TypeAlias = Callable[..., dict[int, Use]]
"""`(call, *args, **kwargs of the torch function)` -> `{id of a parameter: its use}`."""


# Matrices: y[t, c] = Σ_d W[c, d] a[t, d].


def linear(
    call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> dict[int, Use]:
    """`F.linear`: W is `(c, d)`."""
    call.expect(not call.is_parameter(input), "the input is a parameter")
    uses: dict[int, Use] = {}
    if call.is_parameter(weight):
        if weight.ndim == 1:
            uses[id(weight)] = _matrix(call, input, weight, _row, _row_back, 1)
        else:
            c = weight.shape[0]
            uses[id(weight)] = _matrix(call, input, weight, _same, _same_back, c)
    if call.is_parameter(bias):
        assert bias is not None
        uses[id(bias)] = _bias(call, bias)
    return uses


def addmm(
    call: Call,
    input: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> dict[int, Use]:
    """`torch.addmm(b, a, W)`: W is `(d, c)`."""
    call.expect(alpha == 1 and beta == 1, "alpha or beta is not 1")
    uses = matmul(call, mat1, mat2) if call.is_parameter(mat2) else {}
    if call.is_parameter(input):
        uses[id(input)] = _bias(call, input)
    return uses


def matmul(call: Call, input: Tensor, other: Tensor) -> dict[int, Use]:
    """`a @ W` with W `(d, c)` or `(d,)`, and `W @ a` with W `(c, d)`."""
    if call.is_parameter(other):
        call.expect(not call.is_parameter(input), "both sides are parameters")
        call.expect(other.ndim <= 2 <= input.ndim, "a stack of matrices")
        if other.ndim == 1:
            return {id(other): _matrix(call, input, other, _row, _row_back, 1)}
        c = other.shape[1]
        return {id(other): _matrix(call, input, other, _flip, _flip_back, c)}
    call.expect(input.ndim == 2 and other.ndim >= 3, "a stack of matrices")
    c, d = input.shape
    axis = call.axis.axis
    call.expect(axis < other.ndim - 2, "the examples are columns")
    data = call.first(other)
    t = math.prod(data.shape[1:-2]) * data.shape[-1]

    def left(part: Tensor) -> Tensor:
        return part.movedim(-2, -1).reshape(len(part), 1, -1, d)

    def right(gradient: Tensor) -> Tensor:
        return call.first(gradient).movedim(-2, -1).reshape(call.n, 1, -1, c)

    use = Outer(data, left, right, _same, _same_back, (1, t, c, d), t * d)
    return {id(input): use}


def _same(weight: Tensor) -> Tensor:
    return weight[None]


def _same_back(rows: Tensor) -> Tensor:
    return rows.squeeze(-3)


def _flip(weight: Tensor) -> Tensor:
    return weight.mT[None]


def _flip_back(rows: Tensor) -> Tensor:
    return rows.squeeze(-3).mT


def _row(weight: Tensor) -> Tensor:
    return weight[None, None]


def _row_back(rows: Tensor) -> Tensor:
    return rows.squeeze(-2).squeeze(-2)


def _matrix(
    call: Call,
    a: Tensor,
    weight: Tensor,
    matrix: Callable[[Tensor], Tensor],
    back: Callable[[Tensor], Tensor],
    c: int,
) -> Outer:
    """A weight that maps the last axis of `a`."""
    d = a.shape[-1]
    call.expect(call.axis.axis < a.ndim - 1, "the examples are features")
    data = call.first(a).reshape(call.n, 1, -1, d)

    def right(gradient: Tensor) -> Tensor:
        return call.first(gradient).reshape(call.n, 1, -1, c)

    shape = (1, data.shape[2], c, d)
    return Outer(data, lambda part: part, right, matrix, back, shape)


def _bias(call: Call, bias: Tensor) -> Direct:
    """Added to the last axis of the output of a matrix."""
    call.expect(bias.ndim == 1, "the bias is no vector")
    axis = len(call.tap.shape) - 1
    return _channels(call, bias, axis, None, bias=True)


# One number for each channel, and broadcast arithmetic.


def _channels(
    call: Call, p: Tensor, axis: int, factor: Tensor | None, *, bias: bool = False
) -> Direct:
    """A vector along one axis of the output: ∂f/∂p = Σ g·factor."""
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


def _broadcast(
    call: Call, p: Tensor, values: Callable[[Tensor], Tensor]
) -> dict[int, Use]:
    call.expect(p.ndim <= len(call.tap.shape), "the output has fewer axes")
    work = math.prod(call.tap.shape) // call.n

    def rows(gradient: Tensor) -> Tensor:
        return summed(call, values(gradient), p)

    return {id(p): Direct(rows, unexpanded(p).numel(), work)}


def add(
    call: Call, input: Tensor, other: Tensor, *, alpha: float = 1
) -> dict[int, Use]:
    """`x + αp` and `p + αx`."""
    if call.is_parameter(other):
        call.expect(not call.is_parameter(input), "both sides are parameters")
        return _broadcast(call, other, lambda g: g if alpha == 1 else alpha * g)
    return _broadcast(call, input, lambda g: g)


def sub(
    call: Call, input: Tensor, other: Tensor, *, alpha: float = 1
) -> dict[int, Use]:
    """`x − αp` and `p − αx`."""
    return add(call, input, other, alpha=-alpha)


def mul(call: Call, input: Tensor, other: Tensor) -> dict[int, Use]:
    """`x·p` and `p·x`."""
    p, x = (other, input) if call.is_parameter(other) else (input, other)
    call.expect(not call.is_parameter(x), "both sides are parameters")
    return _broadcast(call, p, lambda g: g * x)


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

        uses |= _broadcast(call, p, values)
    return uses


def prelu(call: Call, input: Tensor, weight: Tensor) -> dict[int, Use]:
    """One slope, or one for each channel."""
    call.expect(not call.is_parameter(input), "the input is a parameter")
    axis = min(1, input.ndim - 1)
    shape = [-1 if i == axis else 1 for i in range(input.ndim)]
    negative = input.clamp(max=0)
    if weight.numel() > 1:
        return {id(weight): _channels(call, weight, axis, negative)}
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
            uses |= _broadcast(call, tensor, place)
        start += size
    return uses


# Normalizations: y = w·z + b with z the normalized input.


def _affine(
    call: Call,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Callable[[], Tensor],
    axis: int | None,
) -> dict[int, Use]:
    """Scale and shift: along a channel axis, or broadcast from the last axes."""
    uses: dict[int, Use] = {}
    if call.is_parameter(weight):
        assert weight is not None
        with torch.no_grad():
            factor = z()
        if axis is None:
            uses |= _broadcast(call, weight, lambda g: g * factor)
        else:
            uses[id(weight)] = _channels(call, weight, axis, factor)
    if call.is_parameter(bias):
        assert bias is not None
        if axis is None:
            uses |= _broadcast(call, bias, lambda g: g)
        else:
            uses[id(bias)] = _channels(call, bias, axis, None)
    return uses


def layer_norm(
    call: Call,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> dict[int, Use]:
    """`F.layer_norm`."""
    call.expect(not call.is_parameter(input), "the input is a parameter")

    def z() -> Tensor:
        return F.layer_norm(input, normalized_shape, None, None, eps)

    return _affine(call, weight, bias, z, None)


def rms_norm(
    call: Call,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> dict[int, Use]:
    """`F.rms_norm`."""
    call.expect(not call.is_parameter(input), "the input is a parameter")
    return _affine(
        call, weight, None, lambda: F.rms_norm(input, normalized_shape, None, eps), None
    )


def group_norm(
    call: Call,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> dict[int, Use]:
    """`F.group_norm`."""
    call.expect(not call.is_parameter(input), "the input is a parameter")

    def z() -> Tensor:
        return F.group_norm(input, num_groups, None, None, eps)

    return _affine(call, weight, bias, z, 1)


def batch_norm(
    call: Call,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> dict[int, Use]:
    """`F.batch_norm` on running statistics."""
    call.expect(not (training or call.is_parameter(input)), "batch statistics")

    def z() -> Tensor:
        return F.batch_norm(input, running_mean, running_var, eps=eps)

    return _affine(call, weight, bias, z, 1)


def instance_norm(
    call: Call,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> dict[int, Use]:
    """`F.instance_norm`."""
    call.expect(not call.is_parameter(input), "the input is a parameter")

    def z() -> Tensor:
        if use_input_stats:
            return F.instance_norm(input, eps=eps)
        return F.batch_norm(input, running_mean, running_var, eps=eps)

    return _affine(call, weight, bias, z, 1)


# Tables.


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


# Whatever has no rule.


def local(call: Call, *args: Any, **kwargs: Any) -> dict[int, Use]:
    """Any function: run again for each example, with parameters of its own."""
    n, axis, shape = call.n, call.axis, call.tap.shape
    outputs: list[Tensor] = []
    copies: dict[int, list[Tensor]] = {key: [] for key in call.tap.sources}

    def of_example(tensor: Tensor, i: int) -> Tensor:
        if id(tensor) in copies:
            copies[id(tensor)].append(tensor.clone().requires_grad_())
            return copies[id(tensor)][i]
        if tensor.ndim > axis.axis and tensor.shape[axis.axis] == shape[axis.axis]:
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
        key: Direct(partial(rows, own=own), own[0].numel(), work * own[0].numel())
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

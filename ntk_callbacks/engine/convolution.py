"""Rules of convolutions: a weight that multiplies the patches of its input."""

import math
from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - as torch calls it

from ntk_callbacks.engine.factors import Call, Direct, Outer, Use

Sizes: TypeAlias = int | Sequence[int]


def convolution(
    call: Call,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> dict[int, Use]:
    """`F.conv1d`, `F.conv2d`, `F.conv3d`: a is a patch, t a position of the output."""
    _check(call, input, weight)
    uses = _bias(call, bias)
    if not call.is_parameter(weight):
        return uses
    c, per_group, *kernel = weight.shape
    strides, dilations = _each(stride, kernel), _each(dilation, kernel)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        before = [size // 2 for size in total]
    else:
        before = _each(0 if isinstance(padding, str) else padding, kernel)
    out = list(call.tap.shape[2:])
    data = call.first(input)
    k, size = data.shape[1], math.prod(kernel)
    d, t = per_group * size, k * math.prod(out)

    def left(part: Tensor, columns: slice) -> Tensor:
        first, last = columns.start // size, -(-columns.stop // size)
        flat = part.reshape(-1, groups, per_group, *part.shape[3:])
        read = flat[:, :, first:last].flatten(1, 2)
        found = patches(read, kernel, out, strides, before, dilations)
        found = found.view(len(part), k, groups, (last - first) * size, -1)
        start = columns.start - first * size
        return _positions(found.narrow(3, start, columns.stop - columns.start))

    def right(gradient: Tensor) -> Tensor:
        return _positions(
            call.first(gradient).reshape(call.n, k, groups, c // groups, -1)
        )

    use = Outer(
        data,
        left,
        right,
        matrix=lambda w: w.reshape(groups, c // groups, d),
        weight=lambda rows: rows.reshape(*rows.shape[:-3], *weight.shape),
        shape=(groups, t, c // groups, d),
        unit=size,
        scratch=t * groups,
    )
    return uses | {id(weight): use}


def transposed_convolution(
    call: Call,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
) -> dict[int, Use]:
    """`F.conv_transpose*`: g is a patch of the gradient, t a position of the input."""
    _check(call, input, weight)
    uses = _bias(call, bias)
    if not call.is_parameter(weight):
        return uses
    channels, per_group, *kernel = weight.shape
    strides, dilations = _each(stride, kernel), _each(dilation, kernel)
    before, out = _each(padding, kernel), list(input.shape[2:])
    data = call.first(input)
    k, d = data.shape[1], channels // groups
    c = per_group * math.prod(kernel)
    t = k * math.prod(out)

    def left(part: Tensor, columns: slice) -> Tensor:
        whole = part.reshape(len(part), k, groups, d, -1)
        return _positions(whole[:, :, :, columns])

    def right(gradient: Tensor) -> Tensor:
        flat = call.first(gradient).flatten(0, 1)
        found = patches(flat, kernel, out, strides, before, dilations)
        return _positions(found.view(call.n, k, groups, c, -1))

    use = Outer(
        data,
        left,
        right,
        matrix=lambda w: w.reshape(groups, d, c).mT,
        weight=lambda rows: rows.mT.reshape(*rows.shape[:-3], *weight.shape),
        shape=(groups, t, c, d),
    )
    return uses | {id(weight): use}


def patches(
    x: Tensor,
    kernel: Sequence[int],
    out: Sequence[int],
    stride: Sequence[int],
    before: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """What each position of the output of a convolution sees of its input.

    Args:
        x: `(m, channels, *spatial)`.
        kernel: Size of the kernel along each spatial axis.
        out: Size of the output along each spatial axis.
        stride: Step from one position to the next.
        before: Zeros put before the first entry of each axis.
        dilation: Step from one entry of the kernel to the next.

    Returns:
        `(m, channels·kernel entries, positions)`.
    """
    m, channels = x.shape[:2]
    sizes = list(zip(x.shape[2:], kernel, out, stride, before, dilation, strict=True))
    if all(k == 1 and s == 1 and p == 0 and o == n for n, k, o, s, p, _ in sizes):
        return x.reshape(m, channels, -1)
    padding: list[int] = []
    for n, k, o, s, p, d in reversed(sizes):
        reach = (o - 1) * s + (k - 1) * d + 1
        padding += [p, reach - n - p]  # negative: what no position sees
    x = F.pad(x, padding).contiguous()
    along = x.stride()[2:]
    windows = x.as_strided(
        (m, channels, *kernel, *out),
        (
            *x.stride()[:2],
            *(step * d for step, d in zip(along, dilation, strict=True)),
            *(step * s for step, s in zip(along, stride, strict=True)),
        ),
    )
    return windows.reshape(m, channels * math.prod(kernel), -1)


def _positions(parts: Tensor) -> Tensor:
    """`(m, k, q, d, t)` -> `(m, q, k·t, d)`, a view where k = 1."""
    if parts.shape[1] == 1:
        return parts.squeeze(1).mT
    return parts.permute(0, 2, 1, 4, 3).flatten(2, 3)


def _check(call: Call, input: Tensor, weight: Tensor) -> None:
    call.expect(not call.is_parameter(input), "the input is a parameter")
    call.expect(input.ndim == weight.ndim, "no batch axis")
    call.expect(call.axis.axis == 0, "the examples are channels or positions")


def _bias(call: Call, bias: Tensor | None) -> dict[int, Use]:
    if bias is None or not call.is_parameter(bias):
        return {}

    def rows(gradient: Tensor) -> Tensor:
        parts = call.first(gradient)
        return parts.sum([1, *range(3, parts.ndim)])

    work = math.prod(call.tap.shape) // call.n
    return {id(bias): Direct(rows, bias.numel(), work, bias=True)}


def _each(value: Sizes, axes: Sequence[int]) -> list[int]:
    """A number for every spatial axis."""
    if isinstance(value, int):
        return [value] * len(axes)
    return list(value) * (len(axes) if len(value) == 1 else 1)

"""Rules of matrices: y[t, c] = Σ_d W[c, d] a[t, d]."""

import math
from collections.abc import Callable

from torch import Tensor

from ntk_callbacks.engine.broadcast import channels
from ntk_callbacks.engine.factors import Call, Direct, Outer, Use


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

    def left(part: Tensor, columns: slice) -> Tensor:
        chosen = part[..., columns, :]
        return chosen.movedim(-2, -1).reshape(len(part), 1, t, -1)

    def right(gradient: Tensor) -> Tensor:
        return call.first(gradient).movedim(-2, -1).reshape(call.n, 1, -1, c)

    shape = (1, t, c, d)
    use = Outer(data, left, right, _same, _same_back, shape, scratch=t)
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
    return Outer(data, _columns, right, matrix, back, shape)


def _columns(part: Tensor, columns: slice) -> Tensor:
    return part[..., columns]


def _bias(call: Call, bias: Tensor) -> Direct:
    """Added to the last axis of the output of a matrix."""
    call.expect(bias.ndim == 1, "the bias is no vector")
    axis = len(call.tap.shape) - 1
    return channels(call, bias, axis, None, bias=True)

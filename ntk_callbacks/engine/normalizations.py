"""Rules of normalizations: y = w·z + b with z the normalized input."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - as torch calls it

from ntk_callbacks.engine.broadcast import broadcast, channels
from ntk_callbacks.engine.factors import Call, Use


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
            uses |= broadcast(call, weight, lambda g: g * factor)
        else:
            uses[id(weight)] = channels(call, weight, axis, factor)
    if call.is_parameter(bias):
        assert bias is not None
        if axis is None:
            uses |= broadcast(call, bias, lambda g: g)
        else:
            uses[id(bias)] = channels(call, bias, axis, None)
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

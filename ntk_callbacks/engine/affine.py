"""σ_w and σ_b of a layer as it stands, whatever its parametrization."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ntk_callbacks.layout import widened

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {
    3: functional.conv1d,
    4: functional.conv2d,
    5: functional.conv3d,
}
_SIZES = ("in_features", "in_channels", "fan_in", "nx")  # nx: Conv1D of transformers
_PLAIN = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


def is_affine(module: nn.Module) -> bool:
    """Whether a module looks like a linear or convolutional layer.

    Args:
        module: Any module.

    Returns:
        True for those of torch, and for others that have a `weight` of two axes or more
        and say how many inputs they take: `in_features`, `in_channels`, `fan_in`, or
        `nx` as the `Conv1D` of transformers.
    """
    weight = getattr(module, "weight", None)
    sized = any(hasattr(module, name) for name in _SIZES)
    return sized and isinstance(weight, Tensor) and weight.ndim >= 2


@torch.no_grad()
def layer_scales(
    module: nn.Module, inputs: Tensor, outputs: Tensor
) -> tuple[float, float]:
    """Measured σ_w and σ_b of an affine layer, by what it does to its inputs.

    With y₀ the outputs for the raw weight W alone, y = s y₀ + t b: s and t are 1 for
    the layers of torch and σ_w/√fan_in, σ_b in the NTK parametrization. Then
    σ_w = s √(fan_in ⟨W²⟩) and σ_b = t √⟨b²⟩, means over all entries.

    Args:
        module: What turned `inputs` into `outputs`.
        inputs: Inputs of the layer; examples first for convolutions.
        outputs: What it returned for them.

    Returns:
        The two numbers ≥ 0; NaN if the layer is not such a map of its `weight` and
        `bias` (transposed convolutions, adapters, quantized layers).
    """
    unknown = torch.nan, torch.nan
    if not is_affine(module):
        return unknown
    weight, bias = module.weight, getattr(module, "bias", None)
    if not isinstance(weight, Tensor):
        return unknown
    if hasattr(module, "nx"):  # held as (inputs, outputs)
        weight = weight.T
    bias = bias if isinstance(bias, Tensor) else weight.new_zeros(())
    sigma_w = (weight[0].numel() * widened(weight).square().mean()).sqrt()
    sigma_b = widened(bias).square().mean().sqrt()
    if type(module).forward in _PLAIN:
        return float(sigma_w), float(sigma_b)
    fitted = _fitted(module, weight, bias, inputs[:2], outputs[:2])
    return unknown if fitted is None else _scaled(fitted, sigma_w, sigma_b)


def _scaled(fitted: Tensor, *sigmas: Tensor) -> tuple[float, float]:
    sigma_w, sigma_b = (fitted.abs() * torch.stack(sigmas).to(fitted)).tolist()
    return sigma_w, sigma_b


def _fitted(
    module: Any, weight: Tensor, bias: Tensor, inputs: Tensor, outputs: Tensor
) -> Tensor | None:
    """Factors s and t by least squares; None if they do not reproduce the outputs."""
    try:
        if weight.ndim == 2:
            raw = functional.linear(inputs, weight)
        else:
            raw = _CONVOLUTIONS[weight.ndim](
                inputs,
                weight,
                stride=module.stride,
                padding=module.padding,
                dilation=getattr(module, "dilation", 1),
                groups=getattr(module, "groups", 1),
            )
            bias = bias.reshape(-1, *[1] * (weight.ndim - 2)) if bias.ndim else bias
        columns = torch.stack([raw, bias.expand_as(raw)], -1)
    except (AttributeError, KeyError, RuntimeError, TypeError):  # something else then
        return None
    if raw.shape != outputs.shape:
        return None
    matrix, found = widened(columns).reshape(-1, 2), widened(outputs).reshape(-1)
    if not (matrix.isfinite().all() and found.isfinite().all()):
        return None
    scales = torch.linalg.pinv(matrix) @ found
    off = torch.linalg.vector_norm(matrix @ scales - found)
    # Round-off of float32 is near 1e-6; another operation is off by order one.
    return scales if off <= 1e-3 * torch.linalg.vector_norm(found) else None

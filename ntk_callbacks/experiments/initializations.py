"""Initial weights with which signals and gradients survive depth, in place.

Like the functions of `torch.nn.init`; they touch the weights and biases of linear and
convolutional layers and nothing else. With σ_w and σ_b of a critical point,
W ~ N(0, σ_w²/fan_in) and b ~ N(0, σ_b²), a layer keeps the mean square of gradients;
with orthogonal weights in place of Gaussian ones, deep linear networks keep every
singular value, and networks with saturating activations nearly do (dynamical isometry).
"""

import math
import warnings

import torch
from torch import Tensor, nn

from ntk_callbacks.theory import critical_point
from ntk_callbacks.theory.activations import Activation
from ntk_callbacks.theory.jacobian_spectra import Weights
from ntk_callbacks.theory.learning import check_choice

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


@torch.no_grad()
def critical_(
    module: nn.Module,
    activation: Activation,
    *,
    sigma_b: float = 0.0,
    weights: Weights = "gaussian",
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Put the linear and convolutional layers of a module at a critical point.

    Every `nn.Linear` and `nn.Conv*d` in it gets σ_w = `critical_sigma_w(activation,
    sigma_b)` and biases of σ_b. With `weights="orthogonal"` linear layers get
    `scaled_orthogonal_` and convolutions `delta_orthogonal_`. What else has matrices of
    parameters (embeddings, attention's packed projections) is left as it is, with a
    warning.

    Args:
        module: Any module, a single layer too.
        activation: The φ between its layers: a name in `theory.ACTIVATIONS` or an
            elementwise callable.
        sigma_b: σ_b ≥ 0; for piecewise linear activations only 0 is critical.
        weights: `"gaussian"` or `"orthogonal"`.
        generator: Source of random numbers, on the device of the parameters; None for
            the global one.

    Returns:
        The module.

    Raises:
        ValueError: If there is no critical point, no layer to initialize, or a layer
            cannot be: without a bias for σ_b > 0, without channels enough to be
            orthogonal, with weights that are computed from others. Nothing is changed
            then.

    Example:
        >>> net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256))
        >>> _ = critical_(net, "relu")
        >>> bool((net[2].weight.std() * 256**0.5 - 2**0.5).abs() < 0.02)
        True

    References:
        Schoenholz et al. (2017), arXiv:1611.01232; Pennington, Schoenholz and Ganguli
        (2017), arXiv:1711.04735; Xiao et al. (2018), arXiv:1806.05393.
    """
    check_choice(Weights, weights=weights)
    sigma_w = critical_point(activation, sigma_b).sigma_w.item()
    layers = {
        name: part for name, part in module.named_modules() if isinstance(part, _LAYERS)
    }
    if not layers:
        raise ValueError(
            f"critical_: {type(module).__name__} holds no nn.Linear or nn.Conv1d, 2d, "
            "3d. Layers that draw their own weights take sigma_w and sigma_b when they "
            "are built."
        )
    for name, layer in layers.items():
        _check_layer(name or type(layer).__name__, layer, sigma_b, weights)
    _warn_of_others(module)
    for layer in layers.values():
        if weights == "gaussian":
            deviation = sigma_w / math.sqrt(layer.weight[0].numel())
            layer.weight.normal_(0.0, deviation, generator=generator)
        elif isinstance(layer, nn.Linear):
            scaled_orthogonal_(layer.weight, sigma_w, generator)
        else:
            delta_orthogonal_(layer.weight, sigma_w, generator)
        if layer.bias is not None:
            layer.bias.normal_(0.0, sigma_b, generator=generator)
    return module


@torch.no_grad()
def scaled_orthogonal_(
    weight: Tensor, gain: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Random orthogonal weights that keep the mean square of a signal, up to gain².

    A square matrix is `gain` times orthogonal. With more outputs than inputs its
    columns are orthogonal, with norm gain · √(outputs/inputs), so that the mean square
    of the outputs is gain² times that of the inputs; with fewer, its rows are, with
    norm gain, and it is so for random inputs.

    Args:
        weight: (outputs, inputs), filled in place.
        gain: σ_w.
        generator: Source of random numbers; None for the global one.

    Returns:
        The weight.

    Raises:
        ValueError: If the weight is not a matrix of floating-point numbers.

    Example:
        >>> weight = scaled_orthogonal_(torch.empty(8, 2))
        >>> torch.linalg.svdvals(weight).round(decimals=4)
        tensor([2., 2.])

    References:
        Saxe, McClelland and Ganguli (2014), arXiv:1312.6120.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(
            f"scaled_orthogonal_: the weight is {_described(weight)}, expected a "
            "matrix of floating-point numbers."
        )
    outputs, inputs = weight.shape
    scale = gain * math.sqrt(max(1.0, outputs / max(inputs, 1)))
    return weight.copy_(scale * _orthogonal(outputs, inputs, weight, generator))


@torch.no_grad()
def delta_orthogonal_(
    weight: Tensor, gain: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Convolution kernels that are orthogonal at the center tap and 0 elsewhere.

    A convolution of stride 1 then multiplies the norm of every image by `gain` ·
    √(outputs/inputs), under any padding that keeps the size of the image: with as many
    outputs as inputs all its singular values are `gain`.

    Args:
        weight: (outputs, inputs, k, …) with odd sizes k and outputs ≥ inputs, filled in
            place. Of grouped convolutions each group is one (outputs/groups, inputs).
        gain: σ_w.
        generator: Source of random numbers; None for the global one.

    Returns:
        The weight.

    Raises:
        ValueError: If there are fewer outputs than inputs, a size is even, or the
            weight is not that of a convolution.

    Example:
        >>> weight = delta_orthogonal_(torch.empty(4, 4, 3, 3))
        >>> torch.linalg.svdvals(weight[:, :, 1, 1]).round(decimals=4)
        tensor([1., 1., 1., 1.])
        >>> weight.count_nonzero().item()
        16

    References:
        Xiao, Bahri, Sohl-Dickstein, Schoenholz and Pennington (2018), arXiv:1806.05393.
    """
    problem = _delta_problem(weight)
    if problem:
        raise ValueError(f"delta_orthogonal_: {problem}")
    outputs, inputs = weight.shape[:2]
    scale = gain * math.sqrt(outputs / inputs)
    taps = weight.zero_().flatten(2)  # a copy where the weight is not contiguous
    taps[:, :, taps.shape[2] // 2] = (
        scale * _orthogonal(outputs, inputs, weight, generator)
    ).to(weight)
    weight.copy_(taps.view(weight.shape))
    return weight


def _orthogonal(
    outputs: int, inputs: int, like: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Orthonormal rows or columns, whichever are fewer, uniform over all such."""
    tall = torch.randn(
        max(outputs, inputs),
        min(outputs, inputs),
        dtype=torch.float64 if like.device.type != "mps" else torch.float32,
        device=like.device,
        generator=generator,
    )
    q: Tensor
    q, r = torch.linalg.qr(tall)
    # With a positive diagonal of R the factor is unique, and Q uniform.
    q = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
    return q if outputs >= inputs else q.mT


def _delta_problem(weight: Tensor) -> str | None:
    if weight.ndim < 3 or not weight.is_floating_point():
        return (
            f"the weight is {_described(weight)}, expected floating-point numbers of "
            "shape (outputs, inputs, k, …)."
        )
    outputs, inputs, *sizes = weight.shape
    if outputs < inputs:
        return (
            f"{inputs} inputs and {outputs} outputs; expected at least as many outputs "
            "as inputs: fewer cannot keep the norm of what they are given."
        )
    if any(size % 2 == 0 for size in sizes):
        return f"a kernel of {sizes} has no center tap, expected odd sizes."
    return None


def _check_layer(name: str, layer: nn.Module, sigma_b: float, weights: Weights) -> None:
    own = layer._parameters.get("weight")
    if own is None or isinstance(own, nn.parameter.UninitializedParameter):
        raise ValueError(
            f"critical_: the weight of {name} is computed from others (weight norm, a "
            "parametrization) or has no shape yet; expected a plain parameter. "
            "Initialize before wrapping it."
        )
    if not own.is_floating_point():
        raise ValueError(f"critical_: the weight of {name} is {_described(own)}.")
    if sigma_b and layer.bias is None:
        raise ValueError(
            f"critical_: {name} has no bias, sigma_b={sigma_b:g} needs one; expected "
            "sigma_b=0 or biases in every layer."
        )
    if weights == "orthogonal" and not isinstance(layer, nn.Linear):
        problem = _delta_problem(own)
        if getattr(layer, "groups", 1) != 1:
            problem = "a grouped convolution, expected groups=1."
        if problem:
            raise ValueError(f'critical_: {name}: {problem} Try weights="gaussian".')


def _warn_of_others(module: nn.Module) -> None:
    others = [
        f"{prefix}.{name}".lstrip(".")
        for prefix, part in module.named_modules()
        if not isinstance(part, (*_LAYERS, *_NORMS))
        for name, parameter in part.named_parameters(recurse=False)
        if parameter.ndim >= 2
    ]
    if others:
        warnings.warn(
            "critical_ left as they are: " + ", ".join(others) + "; it knows nn.Linear "
            "and nn.Conv1d, 2d, 3d.",
            UserWarning,
            stacklevel=4,
        )


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"

"""How far a kernel or the weights have moved."""

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_callbacks._types import Params
from ntk_callbacks.layout import widened
from ntk_callbacks.metrics.checks import real
from ntk_callbacks.metrics.magnitude import frobenius_norm, power_of_two, rescaled


def relative_change(
    kernel: Float[Tensor, "..."], reference: Float[Tensor, "..."]
) -> Float[Tensor, ""]:
    """Relative change in Frobenius norm, ‖Θ − Θ₀‖_F / ‖Θ₀‖_F.

    Args:
        kernel: Θ, of any shape.
        reference: Θ₀ of the same shape.

    Returns:
        Value in [0, ∞); infinite or NaN if the reference is zero.

    Raises:
        ValueError: If the shapes differ, or nothing is in them.

    Example:
        >>> relative_change(torch.tensor([3.0]), torch.tensor([2.0]))
        tensor(0.5000)
    """
    kernel, reference = _pair("relative_change", kernel, reference)
    return frobenius_norm(kernel - reference) / frobenius_norm(reference)


def kernel_distance(
    kernel: Float[Tensor, "..."], reference: Float[Tensor, "..."]
) -> Float[Tensor, ""]:
    """Change of shape, 1 − ⟨Θ, Θ₀⟩_F / (‖Θ‖_F ‖Θ₀‖_F), not centered.

    Blind to the scale of either kernel. Computed as half the squared distance of the
    normalized kernels, which keeps its precision where the distance is small.

    Args:
        kernel: Θ, of any shape.
        reference: Θ₀ of the same shape.

    Returns:
        Value in [0, 1] for two kernels (positive semi-definite), up to 2 otherwise; NaN
        if either is zero.

    Raises:
        ValueError: If the shapes differ, or nothing is in them.

    Example:
        >>> kernel_distance(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))
        tensor(1.)

    References:
        Fort et al. 2020, arXiv:2010.15110 (kernel distance S).
    """
    kernel, reference = _pair("kernel_distance", kernel, reference)
    gap = _unit(kernel) - _unit(reference)
    return (gap**2).sum() / 2


def scale_change(
    kernel: Float[Tensor, "..."], reference: Float[Tensor, "..."]
) -> Float[Tensor, ""]:
    """Part of the change along the reference, a − 1 with a = ⟨Θ, Θ₀⟩_F / ‖Θ₀‖²_F.

    aΘ₀ is the multiple of Θ₀ nearest to Θ. With `shape_change` it splits the relative
    change exactly: relative_change² = scale_change² + shape_change².

    Args:
        kernel: Θ, of any shape.
        reference: Θ₀ of the same shape.

    Returns:
        Value in [−1, ∞) for two kernels (positive semi-definite): 0.5 if the kernel has
        grown by half along Θ₀. NaN or infinite if the reference is zero.

    Raises:
        ValueError: If the shapes differ, or nothing is in them.

    Example:
        >>> scale_change(torch.tensor([3.0, 4.0]), torch.tensor([2.0, 0.0]))
        tensor(0.5000)
    """
    kernel, reference = _pair("scale_change", kernel, reference)
    # Of the difference, not of the kernel: 1 would swallow small changes.
    power = power_of_two(reference.flatten())[0]
    change, unit = (kernel - reference) / power, reference / power
    return (change * unit).sum() / (unit * unit).sum()


def shape_change(
    kernel: Float[Tensor, "..."], reference: Float[Tensor, "..."]
) -> Float[Tensor, ""]:
    """Part of the change across the reference, ‖Θ − aΘ₀‖_F / ‖Θ₀‖_F.

    a as in `scale_change`: what is left of the relative change when the best multiple
    of Θ₀ is taken away. Zero if and only if the kernel has only grown or shrunk.

    Args:
        kernel: Θ, of any shape.
        reference: Θ₀ of the same shape.

    Returns:
        Value in [0, ∞); NaN or infinite if the reference is zero.

    Raises:
        ValueError: If the shapes differ, or nothing is in them.

    Example:
        >>> shape_change(torch.tensor([3.0, 4.0]), torch.tensor([2.0, 0.0]))
        tensor(2.)
    """
    kernel, reference = _pair("shape_change", kernel, reference)
    across = kernel - reference - scale_change(kernel, reference) * reference
    return frobenius_norm(across) / frobenius_norm(reference)


def displacement(params: Params, reference: Params) -> Float[Tensor, ""]:
    """Relative distance of the weights from a reference, ‖θ − θ₀‖₂ / ‖θ₀‖₂.

    Args:
        params: θ, name -> tensor.
        reference: θ₀ with the same names and shapes.

    Returns:
        Value in [0, ∞) in float64; infinite or NaN if θ₀ is zero.

    Raises:
        ValueError: If the names or shapes differ, there are none, or one is complex.

    Example:
        >>> displacement({"w": torch.tensor([3.0])}, {"w": torch.tensor([2.0])})
        tensor(0.5000, dtype=torch.float64)

    References:
        Chizat, Oyallon, Bach 2019, arXiv:1812.07956 (small in the lazy regime).
    """
    return distance(params, reference) / norm(reference)


def cosine_similarity(params: Params, reference: Params) -> Float[Tensor, ""]:
    """Cosine of the angle between two weight vectors, ⟨θ, θ₀⟩ / (‖θ‖ ‖θ₀‖).

    Args:
        params: θ, name -> tensor.
        reference: θ₀ with the same names and shapes.

    Returns:
        Value in [−1, 1] in float64; NaN if either is zero.

    Raises:
        ValueError: If the names or shapes differ, there are none, or one is complex.

    Example:
        >>> cosine_similarity({"w": torch.ones(2)}, {"w": torch.tensor([1.0, 0.0])})
        tensor(0.7071, dtype=torch.float64)
    """
    _check_names(params, reference)
    squares = _inner(params, params) * _inner(reference, reference)
    # One root of both: exactly 1 for equal weights, which a product of two is not.
    return (_inner(params, reference) / squares.sqrt()).clamp(-1.0, 1.0)


def _inner(first: Params, second: Params) -> Float[Tensor, ""]:
    products = [
        (widened(value) * widened(second[name])).sum() for name, value in first.items()
    ]
    return torch.stack(products).sum()


def distance(params: Params, reference: Params) -> Float[Tensor, ""]:
    """Distance of two weight vectors, ‖θ − θ₀‖₂, in float64."""
    _check_names(params, reference)
    return norm(
        {
            name: widened(value) - widened(reference[name])
            for name, value in params.items()
        }
    )


def norm(params: Params) -> Float[Tensor, ""]:
    """Length of a weight vector, ‖θ‖₂, in float64."""
    squares = [(widened(value) ** 2).sum() for value in params.values()]
    return torch.stack(squares).sum().sqrt()


def _unit(kernel: Tensor) -> Tensor:
    """Θ/‖Θ‖_F, also where ‖Θ‖_F itself would overflow."""
    kernel = rescaled(kernel)
    unit: Tensor = kernel / torch.linalg.vector_norm(kernel)
    return unit


def _pair(who: str, kernel: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    if kernel.shape != reference.shape or not kernel.numel():
        raise ValueError(
            f"{who}: the kernel has shape {tuple(kernel.shape)}, the reference "
            f"{tuple(reference.shape)}; expected the same with an entry at least. "
            "Measure both on the same probe and outputs."
        )
    return real(who, kernel), real(who, reference)


def _check_names(params: Params, reference: Params) -> None:
    if params.keys() != reference.keys():
        differ = sorted(params.keys() ^ reference.keys())
        raise ValueError(f"both need the same parameters; only one has {differ}.")
    if not params:
        raise ValueError("there are no weights to compare; expected a tensor at least.")
    for name, value in params.items():
        if value.is_complex() or reference[name].is_complex():
            raise ValueError(
                f"{name!r} is complex; expected real weights. Compare the real and "
                "imaginary parts, torch.view_as_real(weights)."
            )
        if value.shape != reference[name].shape:
            raise ValueError(
                f"{name!r} has shape {tuple(value.shape)}, in the reference "
                f"{tuple(reference[name].shape)}; compare the weights of one model."
            )

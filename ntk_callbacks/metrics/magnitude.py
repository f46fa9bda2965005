"""The size of tensors, where squares of their entries overflow or vanish."""

import torch
from jaxtyping import Float
from torch import Tensor


def power_of_two(values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The power of two in (m/2, m], m the largest magnitude of each last axis.

    Dividing by it changes no digit of any entry, and then squares of float32 neither
    overflow (entries above 1e19) nor vanish (below 1e-23).

    Args:
        values: Any tensor with axes.

    Returns:
        The shape of `values` with a last axis of 1; 1 where all entries are zero, one
        is not finite, or there is none.
    """
    if not values.numel():
        return values.new_ones(1)
    largest = values.detach().abs().amax(-1, keepdim=True)
    mantissa, _ = torch.frexp(largest.float() if largest.itemsize < 4 else largest)
    power = (largest / (2 * mantissa)).to(values.dtype)
    return torch.where((power > 0) & power.isfinite(), power, 1.0)


def rescaled(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """A tensor over the power of two of its largest magnitude; scale-free metrics."""
    return values / power_of_two(values.flatten())[0]


def frobenius_norm(kernel: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """Root of the sum of squares of all entries, ‖Θ‖_F."""
    power = power_of_two(kernel.flatten())[0]
    length: Tensor = torch.linalg.vector_norm(kernel / power) * power
    return length

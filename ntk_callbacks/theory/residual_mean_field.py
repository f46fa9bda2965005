"""Signals and gradients in wide residual networks, x ← x + V φ(W x + b) + a.

With p the mean square of the skip connection and q = σ_w² p + σ_b² that of the
branch's pre-activations, a block makes

    p' = p + σ_v² E φ(√q z)² + σ_a²
    mean square of a gradient, on its way down: · (1 + σ_v² σ_w² E φ'(√q z)²)

There is no fixed point and no critical line: p grows with depth, as a power of it for a
bounded φ, exponentially for ReLU, and gradients as exp(c √l) or exponentially.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_callbacks.theory.activations import Activation, elementwise
from ntk_callbacks.theory.expectations import moment, pair_moment
from ntk_callbacks.theory.learning import check_depth, check_not_negative


@dataclass(frozen=True, slots=True)
class ResidualTrajectory:
    """What becomes of two inputs and of a gradient, block by block; first the start.

    Args:
        p: Mean square of either input's skip connection.
        c: Correlation of the two.
        log_gradient: log of the factor by which the mean square of a gradient grows
            from block l down to the start.
    """

    p: Float[Tensor, " depth"]
    c: Float[Tensor, " depth"]
    log_gradient: Float[Tensor, " depth"]


def residual_trajectory(
    activation: Activation,
    sigma_w: float,
    sigma_b: float,
    *,
    depth: int,
    p: float = 1.0,
    c: float = 1.0,
    branch_sigma_w: float = 1.0,
    branch_sigma_b: float = 0.0,
) -> ResidualTrajectory:
    """Variance, correlation and gradient growth of a residual network.

    Args:
        activation: A name in `ACTIVATIONS` or an elementwise callable φ.
        sigma_w: σ_w ≥ 0 of W.
        sigma_b: σ_b ≥ 0 of b.
        depth: Number of blocks, ≥ 0.
        p: Mean square of the first skip connection, > 0.
        c: Correlation of two inputs there.
        branch_sigma_w: σ_v ≥ 0 of V.
        branch_sigma_b: σ_a ≥ 0 of a.

    Returns:
        `ResidualTrajectory(p, c, log_gradient)` of depth + 1 entries each, float64.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        A ReLU block multiplies both by 1 + σ_v² σ_w²/2:

        >>> found = residual_trajectory("relu", 1.0, 0.0, depth=2)
        >>> found.p
        tensor([1.0000, 1.5000, 2.2500], dtype=torch.float64)
        >>> found.log_gradient.exp()
        tensor([1.0000, 1.5000, 2.2500], dtype=torch.float64)

    References:
        Yang and Schoenholz (2017), arXiv:1712.08969.
    """
    check_depth(depth)
    check_not_negative(
        sigma_w=sigma_w,
        sigma_b=sigma_b,
        branch_sigma_w=branch_sigma_w,
        branch_sigma_b=branch_sigma_b,
        p=p,
    )
    if p == 0 or not -1 <= c <= 1:
        raise ValueError(f"p={p}, c={c}; expected p above 0 and c between -1 and 1.")
    phi = elementwise(activation)
    variance, shared = torch.tensor([p, p * c], dtype=torch.float64)
    gradient = torch.zeros_like(variance)
    states = [torch.stack([variance, shared, gradient])]
    for _ in range(depth):
        own, cross = (sigma_w**2 * part + sigma_b**2 for part in (variance, shared))
        growth = branch_sigma_w**2 * sigma_w**2 * moment(phi, own, derivative=1)
        gradient = gradient + torch.log1p(growth)
        square = moment(phi, own)
        # Identical inputs stay so: no second integral.
        mixed = square if c == 1 else pair_moment(phi, own, own, cross)
        variance = variance + branch_sigma_w**2 * square + branch_sigma_b**2
        shared = shared + branch_sigma_w**2 * mixed + branch_sigma_b**2
        states.append(torch.stack([variance, shared, gradient]))
    variances, covariances, gradients = torch.stack(states, 1)
    return ResidualTrajectory(variances, covariances / variances, gradients)

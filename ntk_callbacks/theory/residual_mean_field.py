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
from ntk_callbacks.theory.expectations import moment, pair_moment, real_numbers
from ntk_callbacks.theory.learning import check_depth
from ntk_callbacks.theory.signal_maps import not_negative


@dataclass(frozen=True, slots=True)
class ResidualTrajectory:
    """What becomes of two inputs and of a gradient, block by block; first the start.

    Args:
        p: Mean square of either input's skip connection.
        c: Correlation of the two.
        log_gradient: log of the factor by which the mean square of a gradient grows
            from block l down to the start.
    """

    p: Float[Tensor, "depth ..."]
    c: Float[Tensor, "depth ..."]
    log_gradient: Float[Tensor, "depth ..."]


def residual_trajectory(
    activation: Activation,
    sigma_w: Float[Tensor, "..."] | float,
    sigma_b: Float[Tensor, "..."] | float,
    *,
    depth: int,
    p: Float[Tensor, "..."] | float = 1.0,
    c: Float[Tensor, "..."] | float = 1.0,
    branch_sigma_w: Float[Tensor, "..."] | float = 1.0,
    branch_sigma_b: Float[Tensor, "..."] | float = 0.0,
) -> ResidualTrajectory:
    """Variance, correlation and gradient growth of a residual network.

    All numbers but the depth may be tensors that broadcast: with `sigma_w[None, :]` and
    `sigma_b[:, None]` the last entries are the phase diagram at this depth, how much
    is left of c and how far gradients have grown in place of order and chaos.

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
        `ResidualTrajectory(p, c, log_gradient)`, float64: depth + 1 entries each,
        followed by the broadcast shape.

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
    numbers = not_negative(
        sigma_w=sigma_w,
        sigma_b=sigma_b,
        branch_sigma_w=branch_sigma_w,
        branch_sigma_b=branch_sigma_b,
        p=p,
    )
    cosine = real_numbers("c", c)
    if (numbers[-1] == 0).any() or not (cosine.abs() <= 1).all():
        raise ValueError(f"p={p}, c={c}; expected p above 0 and c between -1 and 1.")
    phi = elementwise(activation)
    like = torch.zeros_like(cosine)
    for number in numbers:
        like = like + torch.zeros_like(number)
    w, b, v, a, variance, cosine = (number + like for number in (*numbers, cosine))
    shared = variance * cosine
    gradient = torch.zeros_like(variance)
    states = [torch.stack([variance, shared, gradient])]
    for _ in range(depth):
        own, cross = (w**2 * part + b**2 for part in (variance, shared))
        growth = v**2 * w**2 * moment(phi, own, derivative=1)
        gradient = gradient + torch.log1p(growth)
        square = moment(phi, own)
        # Identical inputs stay so: no second integral.
        same = bool((cosine == 1).all())
        mixed = square if same else pair_moment(phi, own, own, cross)
        variance = variance + v**2 * square + a**2
        shared = shared + v**2 * mixed + a**2
        states.append(torch.stack([variance, shared, gradient]))
    variances, covariances, gradients = torch.stack(states, 1)
    return ResidualTrajectory(variances, covariances / variances, gradients)

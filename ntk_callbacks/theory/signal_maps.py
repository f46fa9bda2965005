"""What a layer makes of the variance and the correlation of its inputs.

A pre-activation of a wide random layer is Gaussian with variance q; those of two inputs
have correlation c.

    q' = V(q) = σ_w² E φ(√q z)² + σ_b²                 (q-map)
    c' = C(c) = (σ_w² E φ(u) φ(v) + σ_b²)/V(q)         (c-map, both variances q)
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_callbacks.theory.activations import Activation
from ntk_callbacks.theory.expectations import moment, pair_moment, real_numbers
from ntk_callbacks.theory.learning import check_depth


def q_map(
    activation: Activation,
    q: Float[Tensor, "..."] | float,
    sigma_w: Float[Tensor, "..."] | float,
    sigma_b: Float[Tensor, "..."] | float,
) -> Float[Tensor, "..."]:
    """Variance of the next pre-activations, σ_w² E φ(√q z)² + σ_b².

    Args:
        activation: A name in `ACTIVATIONS` or an elementwise callable φ.
        q: Variances ≥ 0 of the present ones.
        sigma_w: σ_w ≥ 0.
        sigma_b: σ_b ≥ 0.

    Returns:
        Variances of the broadcast shape, float64.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> q_map("relu", 3.0, 1.0, 0.5)
        tensor(1.7500, dtype=torch.float64)

    References:
        Poole et al. (2016), arXiv:1606.05340.
    """
    sigma_w, sigma_b = scales(sigma_w, sigma_b)
    return sigma_w**2 * moment(activation, q) + sigma_b**2


def c_map(
    activation: Activation,
    c: Float[Tensor, "..."] | float,
    q: Float[Tensor, "..."] | float,
    sigma_w: Float[Tensor, "..."] | float,
    sigma_b: Float[Tensor, "..."] | float,
) -> Float[Tensor, "..."]:
    """Correlation of two inputs one layer on, if both have variance q.

    (σ_w² E φ(u) φ(v) + σ_b²)/V(q) with variances q and covariance q c of u and v; at
    the fixed point V(q) = q. For variances that differ see `fully_connected`.

    Args:
        activation: A name in `ACTIVATIONS` or an elementwise callable φ.
        c: Correlations in [−1, 1].
        q: Variances > 0 of both inputs.
        sigma_w: σ_w ≥ 0.
        sigma_b: σ_b ≥ 0.

    Returns:
        Correlations of the broadcast shape, float64; NaN where V(q) is 0.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        Orthogonal inputs of a ReLU network are not orthogonal one layer on:

        >>> c_map("relu", 0.0, 1.0, 2**0.5, 0.0)
        tensor(0.3183, dtype=torch.float64)

    References:
        Poole et al. (2016), arXiv:1606.05340; Cho and Saul (2009) for ReLU.
    """
    sigma_w, sigma_b = scales(sigma_w, sigma_b)
    q, c = real_numbers("q", q), real_numbers("c", c)
    if not (c.abs() <= 1).all():
        raise ValueError(f"c is {c}, expected correlations between -1 and 1.")
    shared = sigma_w**2 * pair_moment(activation, q, q, q * c) + sigma_b**2
    return shared / (sigma_w**2 * moment(activation, q) + sigma_b**2)


@dataclass(frozen=True, slots=True)
class SignalTrajectory:
    """Variance and correlation of two inputs, layer by layer; the first is the start.

    Args:
        q: Variance of either input.
        c: Their correlation.
    """

    q: Float[Tensor, "depth ..."]
    c: Float[Tensor, "depth ..."]


def signal_trajectory(
    activation: Activation,
    sigma_w: float,
    sigma_b: float,
    *,
    depth: int,
    q: Float[Tensor, "..."] | float,
    c: Float[Tensor, "..."] | float = 1.0,
) -> SignalTrajectory:
    """q-map and c-map applied again and again.

    Args:
        activation: A name in `ACTIVATIONS` or an elementwise callable φ.
        sigma_w: σ_w ≥ 0 of every layer.
        sigma_b: σ_b ≥ 0 of every layer.
        depth: Number of layers to follow, ≥ 0.
        q: Variances of the first pre-activations, σ_w² |x|²/n + σ_b² for inputs x.
        c: Correlations of the two inputs' first pre-activations.

    Returns:
        `SignalTrajectory(q, c)` of depth + 1 entries each.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> signal_trajectory("tanh", 1.5, 0.05**0.5, depth=2, q=2.3, c=0.6087).c
        tensor([0.6087, 0.5724, 0.5596], dtype=torch.float64)

    References:
        Poole et al. (2016), arXiv:1606.05340.
    """
    check_depth(depth)
    start = real_numbers("q", q)
    cosine = real_numbers("c", c) + torch.zeros_like(start)
    now = start + torch.zeros_like(cosine)
    variances, correlations = [now], [cosine]
    for _ in range(depth):
        cosine = c_map(activation, cosine, now, sigma_w, sigma_b)
        cosine = cosine.clamp(-1, 1)  # of round-off
        now = q_map(activation, now, sigma_w, sigma_b)
        variances.append(now)
        correlations.append(cosine)
    return SignalTrajectory(torch.stack(variances), torch.stack(correlations))


def scales(*sigmas: Tensor | float) -> list[Tensor]:
    """σ_w and σ_b as tensors, in float64.

    Args:
        *sigmas: σ_w and σ_b.

    Returns:
        The two.

    Raises:
        ValueError: If one is negative or not finite.
    """
    names = ("sigma_w", "sigma_b")
    return not_negative(**dict(zip(names, sigmas, strict=True)))


def not_negative(**numbers: Tensor | float) -> list[Tensor]:
    """Numbers as tensors, in float64.

    Args:
        **numbers: Name -> a number or a tensor.

    Returns:
        Tensors, in their order.

    Raises:
        ValueError: If one is negative, not finite or complex.
    """
    found = []
    for name, given in numbers.items():
        tensor = real_numbers(name, given)
        if not ((tensor >= 0) & tensor.isfinite()).all():
            raise ValueError(f"{name} is {given}, expected numbers of at least 0.")
        found.append(tensor)
    return found

"""Singular values s of the input-output Jacobian of a wide random network.

J = ∏ D_l W_l with W_l Gaussian, entries of variance σ_w²/n, or σ_w times orthogonal,
and D_l diagonal with the slopes φ' of layer l. Infinitely wide, the factors are free:
the S-transforms of D² and W Wᵀ multiply to that of J Jᵀ, whose moments and edges follow
from ψ(x) = E x φ'²/(1 − x φ'²):

    1/s² = x^L z^(1−L) (1+z)^(−1)   / σ_w^{2L}     Gaussian
    1/s² = x^L (z/(1+z))^(1−L)      / σ_w^{2L}     orthogonal,   z = ψ(x)

The largest s² is where the right-hand side, as x grows from 0, first turns down.
"""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_callbacks.theory.activations import Activation
from ntk_callbacks.theory.learning import check_choice, check_counts, check_not_negative
from ntk_callbacks.theory.mean_field import LARGEST, mean_field
from ntk_callbacks.theory.roots import bracketed_root
from ntk_callbacks.theory.slopes import SquaredSlopes, squared_slopes

Weights: TypeAlias = Literal["gaussian", "orthogonal"]
"""Independent normal entries, or σ_w times a random orthogonal matrix."""


@dataclass(frozen=True, slots=True)
class JacobianMoments:
    """Mean, variance and maximum of the squared singular values of J.

    Args:
        mean: (1/n) tr J Jᵀ = χ^L.
        variance: (1/n) tr (J Jᵀ)² − mean².
        maximum: The upper edge of the spectrum, s_max²; infinite if φ' is unbounded.
    """

    mean: Float[Tensor, ""]
    variance: Float[Tensor, ""]
    maximum: Float[Tensor, ""]


def jacobian_moments(
    activation: Activation,
    sigma_w: float,
    sigma_b: float,
    depth: int,
    weights: Weights = "gaussian",
    *,
    q0: float = 1.0,
) -> JacobianMoments:
    """Mean, variance and maximum of s² in an infinitely wide network.

    mean = χ^L and variance = χ^{2L} L (μ₂/μ₁² − 1 − s₁), with μ_k = E φ'^{2k} at the
    fixed point of the variance, s₁ = −1 for Gaussian and 0 for orthogonal weights. A
    finite network scatters about the mean by about √(L/n) from draw to draw.

    Args:
        activation: A name in `ACTIVATIONS` or an elementwise callable φ.
        sigma_w: σ_w ≥ 0.
        sigma_b: σ_b ≥ 0.
        depth: L ≥ 1, number of layers W and φ; the first pre-activations have the
            variance of the fixed point.
        weights: `"gaussian"` or `"orthogonal"`.
        q0: Variance to start from, as in `mean_field`.

    Returns:
        `JacobianMoments(mean, variance, maximum)`, float64.

    Raises:
        ValueError: If an argument is out of range, or the variance diverges and with it
            what φ' is.

    Example:
        The maximum of a product of two Gaussian matrices, (3/2)² · 3:

        >>> jacobian_moments("linear", 1.0, 0.0, 2).maximum
        tensor(6.7500, dtype=torch.float64)

    References:
        Pennington, Schoenholz and Ganguli (2017), arXiv:1711.04735; (2018),
        arXiv:1802.09979.
    """
    slopes = slopes_at_fixed_point(
        activation, sigma_w, sigma_b, depth, weights, q0=q0, panels=16
    )
    mean = (sigma_w**2 * slopes.moment(1)) ** depth
    spread = slopes.moment(2) / slopes.moment(1) ** 2 - 1
    if weights == "gaussian":
        spread = spread + 1
    maximum = _maximum(slopes, sigma_w, depth, weights)
    silent = slopes.moment(1) == 0
    return JacobianMoments(
        mean,
        torch.where(silent, 0.0, mean**2 * depth * spread),
        torch.where(silent, 0.0, maximum),
    )


def slopes_at_fixed_point(
    activation: Activation,
    sigma_w: float,
    sigma_b: float,
    depth: int,
    weights: Weights,
    *,
    q0: float,
    panels: int,
) -> SquaredSlopes:
    """φ'² where the q-map of the network leads, after a check of the arguments.

    Args:
        activation: φ.
        sigma_w: σ_w ≥ 0.
        sigma_b: σ_b ≥ 0.
        depth: L ≥ 1.
        weights: `"gaussian"` or `"orthogonal"`.
        q0: Variance to start from.
        panels: Quadrature panels to a standard deviation.

    Returns:
        `SquaredSlopes`.

    Raises:
        ValueError: If an argument is out of range, or φ' has no limit where the
            variance diverges.
    """
    check_not_negative(sigma_w=sigma_w, sigma_b=sigma_b)
    check_choice(Weights, weights=weights)
    check_counts(depth=depth)
    q = mean_field(activation, sigma_w, sigma_b, q0=q0).q
    if q.isfinite():
        return squared_slopes(activation, q.clamp(min=1e-20), panels=panels)
    first, later = (
        squared_slopes(activation, scale * LARGEST, panels=panels)
        for scale in (1e-4, 1.0)
    )
    if not torch.allclose(first.moment(1), later.moment(1), rtol=1e-2):
        raise ValueError(
            f"the variance of {activation!r} diverges at sigma_w={sigma_w:g}, "
            f"sigma_b={sigma_b:g} and φ' with it: the Jacobian has no limit. Expected "
            "a finite fixed point of the q-map, or a φ that is linear far out."
        )
    return later


def _maximum(
    slopes: SquaredSlopes, sigma_w: float, depth: int, weights: Weights
) -> Tensor:
    """s_max²: the first turning point of 1/s² as x runs to 1/max φ'²."""
    if not slopes.largest.isfinite():
        return slopes.largest
    unit = SquaredSlopes(
        slopes.values / slopes.largest, slopes.weights, slopes.largest**0
    )
    below = 1 if weights == "gaussian" else 1 - depth  # power of 1/(1 + z)

    def rise(odds: Tensor) -> Tensor:
        # d log(1/s²) / d log x; odds are log(x/(1 − x)).
        x = odds.sigmoid()
        z = unit.generating_function(x)
        growth = x * unit.generating_slope(x)
        return depth + ((1 - depth) / z - below / (1 + z)) * growth

    grid = torch.linspace(-80.0, 25.0, 421, dtype=torch.float64)
    falls = (rise(grid) < 0).nonzero()
    if len(falls):
        k = int(falls[0])
        odds = bracketed_root(rise, grid[k - 1 : k], grid[k : k + 1])
    else:
        odds = grid[-1:]  # the edge is where every unit has its largest slope
    x = odds.sigmoid()
    z = unit.generating_function(x)
    log = depth * x.log() + (1 - depth) * z.log() - below * (1 + z).log()
    scale = slopes.largest.log() + 2 * slopes.largest.new_tensor(sigma_w).log()
    return torch.exp(depth * scale - log)[0]


def fuss_catalan_moments(depth: int, count: int) -> Float[Tensor, " k"]:
    """Moments (1/n) tr (J Jᵀ)^k, k = 1, 2, …, of a product of L Gaussian matrices.

    C((L+1)k, k)/(Lk + 1), the Fuss-Catalan numbers, for wide square factors with
    entries of variance 1/n.

    Args:
        depth: L ≥ 1.
        count: Number of moments, ≥ 1.

    Returns:
        `count` moments, float64.

    Raises:
        ValueError: If an argument is below 1.

    Example:
        >>> fuss_catalan_moments(2, 4)
        tensor([ 1.,  3., 12., 55.], dtype=torch.float64)

    References:
        Penson and Życzkowski (2011), arXiv:1103.3453.
    """
    check_counts(depth=depth, count=count)
    return torch.tensor(
        [
            float(math.comb((depth + 1) * k, k) // (depth * k + 1))
            for k in range(1, count + 1)
        ],
        dtype=torch.float64,
    )


def gaussian_second_moment(width: int, depth: int) -> float:
    """E (1/n) tr (J Jᵀ)² of a product of L Gaussian n × n matrices, at any n.

    With P = E ((1/n) tr J Jᵀ)² and S = E (1/n) tr (J Jᵀ)², both 1 without a factor,
    each factor makes P + 2S/n² and P + (1 + 1/n) S of them; S is L + 1 for n → ∞. The
    mean of (1/n) tr J Jᵀ is 1 at every width.

    Args:
        width: n ≥ 1.
        depth: L ≥ 1.

    Returns:
        S.

    Raises:
        ValueError: If an argument is below 1.

    Example:
        >>> gaussian_second_moment(64, 1)
        2.015625
    """
    return _gaussian_products(width, depth)[1]


def gaussian_squared_mean(width: int, depth: int) -> float:
    """E ((1/n) tr J Jᵀ)² of a product of L Gaussian n × n matrices, at any n.

    P of `gaussian_second_moment`. The mean of (1/n) tr J Jᵀ over seeds is 1, its
    variance P − 1: what a single linear network is off by.

    Args:
        width: n ≥ 1.
        depth: L ≥ 1.

    Returns:
        P.

    Raises:
        ValueError: If an argument is below 1.

    Example:
        >>> gaussian_squared_mean(64, 1)
        1.00048828125
    """
    return _gaussian_products(width, depth)[0]


def _gaussian_products(width: int, depth: int) -> tuple[float, float]:
    """P and S."""
    check_counts(width=width, depth=depth)
    squared_mean, mean_square = 1.0, 1.0
    for _ in range(depth):
        squared_mean, mean_square = (
            squared_mean + 2 * mean_square / width**2,
            squared_mean + (1 + 1 / width) * mean_square,
        )
    return squared_mean, mean_square

"""Densities of the squared singular values of wide random networks.

With G(λ) = (1/n) tr (λ − J Jᵀ)⁻¹ and z = λ G(λ) − 1, the density is −Im G(λ + i0)/π.
The equation of `ntk_callbacks.theory.jacobian_spectra` for 1/λ has many complex
solutions; the right one is followed from large imaginary λ, where z = E s²/λ, down to
|λ| and then around to the real axis.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from ntk_callbacks.theory.activations import Activation
from ntk_callbacks.theory.jacobian_spectra import Weights, slopes_at_fixed_point
from ntk_callbacks.theory.learning import check_counts
from ntk_callbacks.theory.roots import bracketed_root
from ntk_callbacks.theory.slopes import SquaredSlopes

_TURNS = 96
_ROUND_OFF = 1e-13


@dataclass(frozen=True, slots=True)
class JacobianDensity:
    """How the squared singular values of an infinitely wide network are distributed.

    Args:
        squared: s², where the density was asked for.
        density: Density of s² there; that of s is 2 s times it.
        atoms: Values of s² that a finite share of the singular values has, ascending.
        masses: Their shares; with the integral of the density they add up to 1.
    """

    squared: Float[Tensor, " g"]
    density: Float[Tensor, " g"]
    atoms: Float[Tensor, " a"]
    masses: Float[Tensor, " a"]


def jacobian_density(
    activation: Activation,
    sigma_w: float,
    sigma_b: float,
    depth: int,
    weights: Weights,
    squared: Float[Tensor, " g"],
    *,
    q0: float = 1.0,
) -> JacobianDensity:
    """Density of the squared singular values s² of the input-output Jacobian.

    Exact for piecewise linear activations, hard tanh included. For a smooth φ the
    distribution of φ'² is replaced by the nodes of a quadrature: to about 1e-6 within
    the bulk, while near s² = 0 the nodes may show. Close to an edge within about 1e-6
    of it the density is not resolved.

    Args:
        activation: A name in `ACTIVATIONS` or an elementwise callable φ.
        sigma_w: σ_w ≥ 0.
        sigma_b: σ_b ≥ 0.
        depth: L ≥ 1, number of layers W and φ.
        weights: `"gaussian"` or `"orthogonal"`.
        squared: s² > 0 at which to evaluate the density.
        q0: Variance to start from, as in `mean_field`.

    Returns:
        `JacobianDensity(squared, density, atoms, masses)`, float64.

    Raises:
        ValueError: If an argument is out of range, or the variance diverges and with it
            what φ' is.

    Example:
        Half of the units of a ReLU are silent, and so are half of the directions:

        >>> s2 = torch.tensor([0.5, 9.0])
        >>> found = jacobian_density("relu", 2**0.5, 0.0, 4, "orthogonal", s2)
        >>> found.density
        tensor([0.1219, 0.0089], dtype=torch.float64)
        >>> found.masses
        tensor([0.5000], dtype=torch.float64)

    References:
        Pennington, Schoenholz and Ganguli (2018), arXiv:1802.09979.
    """
    slopes = slopes_at_fixed_point(
        activation, sigma_w, sigma_b, depth, weights, q0=q0, panels=1
    )
    targets = _positive(squared)
    gain = sigma_w**2
    atoms, masses = _atoms(slopes, gain, depth, weights)
    empty = not len(targets)
    if (
        empty
        or gain == 0
        or slopes.values[-1] == 0
        or _is_discrete(slopes, depth, weights)
    ):
        return JacobianDensity(targets, torch.zeros_like(targets), atoms, masses)
    # σ_w² and the size of φ'² are taken out: s² is in units of (σ_w² max φ'²)^L.
    largest = slopes.values[-1]
    unit = SquaredSlopes(slopes.values / largest, slopes.weights, largest**0)
    scale = (gain * largest) ** depth
    z = _resolvent(unit, depth, weights, targets / scale)
    imaginary = torch.where(z.imag.abs() <= _ROUND_OFF * z.abs(), 0.0, z.imag)
    density = (-imaginary / (math.pi * targets)).clamp(min=0)
    return JacobianDensity(targets, density, atoms, masses)


def fuss_catalan_density(
    squared: Float[Tensor, " g"], depth: int
) -> Float[Tensor, " g"]:
    """Density of s² of a product of L wide square Gaussian matrices, variance 1/n.

    In parametric form, for 0 < a < π/(L + 1),

        s² = sin((L+1)a)^{L+1} / (sin a sin(La)^L)
        ρ  = sin² a sin(La)^{L−1} / (π sin((L+1)a)^L)

    Marchenko-Pastur's law for L = 1. It diverges as s² → 0 and ends at
    (L+1)^{L+1}/L^L.

    Args:
        squared: s² > 0.
        depth: L ≥ 1.

    Returns:
        Densities, float64; 0 beyond the edge.

    Raises:
        ValueError: If `depth` is below 1 or an s² is not positive.

    Example:
        >>> fuss_catalan_density(torch.tensor([1.0, 2.0, 5.0]), 1)
        tensor([0.2757, 0.1592, 0.0000], dtype=torch.float64)

    References:
        Haagerup and Möller (2013), arXiv:1208.0240; Forrester and Liu (2015),
        arXiv:1404.3549.
    """
    check_counts(depth=depth)
    targets = _positive(squared)
    outer, inner = depth + 1, depth
    edge = outer * math.log(outer) - inner * math.log(inner)
    density = torch.zeros_like(targets)
    inside = targets.log() < edge
    goal = targets[inside].log()

    def excess(angle: Tensor, goal: Tensor) -> Tensor:
        return (
            outer * (outer * angle).sin().log()
            - angle.sin().log()
            - inner * (inner * angle).sin().log()
            - goal
        )

    # The angle runs from just inside the upper edge to just short of s² = 0.
    low = torch.full_like(goal, 1e-9)
    high = torch.full_like(goal, math.pi / outer * (1 - 1e-15))
    angle = bracketed_root(excess, low, high, goal)
    numerator = angle.sin() ** 2 * (inner * angle).sin() ** (inner - 1)
    density[inside] = numerator / (math.pi * (outer * angle).sin() ** inner)
    return density


def _positive(squared: Tensor) -> Tensor:
    if squared.ndim != 1 or squared.is_complex():
        raise ValueError(
            f"squared has shape {tuple(squared.shape)} and {squared.dtype}, expected a "
            "list of real s²."
        )
    targets = squared.detach().to(torch.float64)
    if not ((targets > 0) & targets.isfinite()).all():
        raise ValueError(
            "squared holds numbers that are not positive; expected s² > 0: what lies "
            "at 0 is an atom or a divergence."
        )
    return targets


def _is_discrete(slopes: SquaredSlopes, depth: int, weights: Weights) -> bool:
    """Whether all of the spectrum is atoms: no randomness is left to mix D."""
    return weights == "orthogonal" and (depth == 1 or len(slopes.values) == 1)


def _atoms(
    slopes: SquaredSlopes, gain: float, depth: int, weights: Weights
) -> tuple[Tensor, Tensor]:
    # Silent units give 0 its largest share in any factor. Of a product of free factors
    # a·b is an atom where their masses exceed 1 together, by the excess.
    values, shares = slopes.values, slopes.weights
    if gain == 0 or values[-1] == 0:
        return values.new_zeros(1), values.new_ones(1)
    if weights == "gaussian":
        silent = values == 0
        return values[silent], shares[silent]
    masses = depth * shares - (depth - 1)
    masses = torch.where(values == 0, shares, masses)
    seen = masses > 1e-12
    return (gain * values[seen]) ** depth, masses[seen]


def _resolvent(
    slopes: SquaredSlopes, depth: int, weights: Weights, targets: Tensor
) -> Complex[Tensor, " g"]:
    """The z of λ + i0 for λ > 0."""
    below = 1 if weights == "gaussian" else 1 - depth

    def improved(
        x: Tensor, logarithm: Tensor, turn: complex | float, steps: int
    ) -> Tensor:
        for _ in range(steps):
            z = slopes.generating_function(x)
            rest = depth * x.log() + (1 - depth) * z.log() - below * (1 + z).log()
            rest = rest + logarithm + turn
            # Whole turns do not count: 1/λ itself is to agree.
            imaginary = torch.remainder(rest.imag + math.pi, 2 * math.pi) - math.pi
            rest = torch.complex(rest.real, imaginary)
            slope = depth / x + (
                (1 - depth) / z - below / (1 + z)
            ) * slopes.generating_slope(x)
            change = rest / slope
            # No step further than half the way to the origin.
            size = (2 * change.abs() / x.abs()).clamp(min=1)
            x = x - change / size
        return x

    start = 60.0
    mean = slopes.moment(1) ** depth
    logarithm = torch.full_like(targets, start) + mean.log().clamp(max=0)
    first = torch.exp(torch.complex(-logarithm, torch.full_like(targets, -math.pi / 2)))
    x = first * mean / slopes.moment(1)
    quarter = 1j * math.pi / 2
    downs = max(int((float(logarithm[0] - targets.log().min())) / 0.25), 8)
    for step in range(1, downs + 1):
        now = logarithm + (targets.log() - logarithm) * (step / downs)
        x = improved(x, now.to(x.dtype), quarter, 3)
    for step in range(1, _TURNS + 1):
        x = improved(x, targets.log().to(x.dtype), quarter * (1 - step / _TURNS), 3)
    x = improved(x, targets.log().to(x.dtype), 0.0, 12)
    return slopes.generating_function(x)

"""How signals and gradients survive depth in a wide random network.

At the fixed points of the q-map and the c-map (`ntk_callbacks.theory.signal_maps`),

    χ = σ_w² E φ'(√q z)² = C'(1)

is the factor by which a layer multiplies the mean square of a small perturbation on
its way up and of a gradient on its way down: χ < 1 is the ordered phase, χ > 1 the
chaotic one.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ntk_callbacks.theory.activations import Activation
from ntk_callbacks.theory.expectations import curvature_moment, moment, pair_moment
from ntk_callbacks.theory.roots import bracketed_root
from ntk_callbacks.theory.signal_maps import scales

LARGEST = 1e12
"""A variance that grows beyond this is taken to diverge."""
_SMALLEST = 1e-12
_RATIO = 1.1
_ROUND_OFF = 1e-14
_MARGIN = 1e-10
_NOTHING = 1e-90


@dataclass(frozen=True, slots=True)
class MeanField:
    """Fixed points of the maps of a layer, and how fast they are approached.

    Args:
        q: Variance of the pre-activations at the fixed point; infinite if it diverges.
        c: Correlation that two inputs end up with: 1 in the ordered phase and where
            q = 0, below 1 in the chaotic one; NaN if q diverges.
        chi: χ at q, the slope of the c-map at 1; its value at q = 1e12 if q diverges.
        xi_q: Layers in which a deviation of the variance falls to 1/e, −1/log|V'(q)|;
            infinite if it does not fall exponentially.
        xi_c: The same of the correlation, −1/log C'(c); NaN if q diverges.
    """

    q: Float[Tensor, "..."]
    c: Float[Tensor, "..."]
    chi: Float[Tensor, "..."]
    xi_q: Float[Tensor, "..."]
    xi_c: Float[Tensor, "..."]

    @property
    def is_chaotic(self) -> Bool[Tensor, "..."]:
        """Where χ > 1 (by 1e-10): nearby inputs part, gradients grow with depth."""
        return self.chi > 1 + _MARGIN


def mean_field(
    activation: Activation,
    sigma_w: Float[Tensor, "..."] | float,
    sigma_b: Float[Tensor, "..."] | float,
    *,
    q0: float = 1.0,
) -> MeanField:
    """Fixed points of a plain network, χ, and the depth scales ξ_q and ξ_c.

    Of several fixed points of the q-map it is the one next to `q0` on the side to which
    the map moves it; for an activation with x φ(x) φ'(x) ≥ 0 this is where layer after
    layer leads. Two that lie within 10 % of each other may be passed over. If q0
    itself is a fixed point (ReLU at σ_w = √2, σ_b = 0) it stays.

    Args:
        activation: A name in `ACTIVATIONS` or an elementwise callable φ.
        sigma_w: σ_w ≥ 0, a number or a tensor.
        sigma_b: σ_b ≥ 0, broadcast against `sigma_w`.
        q0: Variance to start from, > 0.

    Returns:
        `MeanField(q, c, chi, xi_q, xi_c)`, float64, of the broadcast shape.

    Raises:
        ValueError: If an argument is out of range, or φ grows so fast that E φ² does
            not exist.

    Example:
        >>> mean_field("tanh", 1.5, 0.05**0.5).q
        tensor(0.8894, dtype=torch.float64)

    References:
        Poole et al. (2016), arXiv:1606.05340 (maps, χ, c*); Schoenholz, Gilmer, Ganguli
        and Sohl-Dickstein (2017), arXiv:1611.01232 (ξ_q, ξ_c).
    """
    sigma_w, sigma_b = scales(sigma_w, sigma_b)
    if not 0 < q0 < math.inf:
        raise ValueError(f"q0 is {q0}, expected a variance above 0.")
    w2 = sigma_w**2 + torch.zeros_like(sigma_b)
    b2 = sigma_b**2 + torch.zeros_like(sigma_w)
    q = _fixed_variance(activation, w2, b2, q0)
    reached = q.clamp(max=LARGEST)
    chi = w2 * moment(activation, reached, derivative=1)
    slope_q = chi + w2 * curvature_moment(activation, reached)
    c, slope_c = torch.ones_like(q), chi.clone()
    apart = (chi > 1 + _MARGIN) & q.isfinite() & (q > 0)
    if apart.any():
        at, gain = q[apart], w2[apart]
        c[apart] = 1 - _fixed_distance(activation, gain, at, chi[apart])
        slope_c[apart] = gain * pair_moment(
            activation, at, at, at * c[apart], derivative=1
        )
    unknown = torch.where(q.isfinite(), 0.0, torch.nan)
    return MeanField(
        q,
        c + unknown,
        chi,
        depth_scale(slope_q).where(q.isfinite(), torch.inf),
        depth_scale(slope_c) + unknown,
    )


def depth_scale(slope: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Layers in which slope^l falls to 1/e; infinite where it does not fall.

    Args:
        slope: Slope of a map at its fixed point.

    Returns:
        −1/log|slope|, or infinity for |slope| ≥ 1.
    """
    return torch.where(slope.abs() < 1, -1 / slope.abs().log(), torch.inf)


def _fixed_variance(
    activation: Activation, w2: Tensor, b2: Tensor, q0: float
) -> Tensor:
    """Where the q-map leads from q0: the next sign change of V(q) − q."""
    q = torch.full_like(w2, q0)
    drift = w2 * moment(activation, q) + b2 - q
    for sign, limit in ((1, LARGEST), (-1, _SMALLEST)):
        moves = sign * drift > _ROUND_OFF * q0
        if moves.any():
            q[moves] = _next_fixed_variance(activation, w2[moves], b2[moves], q0, limit)
    return q


def _next_fixed_variance(
    activation: Activation, w2: Tensor, b2: Tensor, q0: float, limit: float
) -> Tensor:
    """The first sign change of V(q) − q on the way from q0 to the limit."""
    sign = 1 if limit > q0 else -1
    before, beyond = torch.full_like(w2, q0), torch.full_like(w2, torch.nan)
    start = q0
    while beyond.isnan().any() and sign * (limit - start) > 0:
        # A table of E φ² serves every σ_w and σ_b.
        grid = start * _RATIO ** (sign * torch.arange(49, dtype=torch.float64))
        drift = w2[:, None] * moment(activation, grid) + b2[:, None] - grid
        turned = sign * drift < -_ROUND_OFF * grid
        first = turned.double().argmax(1)
        new = beyond.isnan() & turned.any(1)
        before = torch.where(new, grid[first - 1], before)
        beyond = torch.where(new, grid[first], beyond)
        start = float(grid[-1])
    none = beyond.isnan()
    if sign > 0:
        beyond[none] = torch.inf
    else:  # below the grid there is 0, a fixed point itself if V(0) = 0
        still = w2 * moment(activation, torch.zeros_like(w2)) + b2 < _NOTHING
        before = torch.where(none, torch.where(still, 0.0, start), before)
        beyond[none] = 0.0
    some = beyond.isfinite()

    def surplus(q: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return w2 * moment(activation, q) + b2 - q

    beyond[some] = bracketed_root(
        surplus, before[some], beyond[some], w2[some], b2[some]
    )
    return beyond


def _fixed_distance(
    activation: Activation, w2: Tensor, q: Tensor, chi: Tensor
) -> Tensor:
    """1 − c at the stable fixed point, where χ > 1: C is convex on [0, 1]."""

    def chord(
        angle: Tensor, w2: Tensor, q: Tensor, chi: Tensor, square: Tensor
    ) -> Tensor:
        # Slope of C between c and 1, less 1; C(1) = 1 is divided out.
        distance = 2 * (angle / 2).sin() ** 2
        near = distance < 1e-12
        mixed = pair_moment(activation, q, q, q * (1 - distance))
        slope = w2 * (square - mixed) / (q * distance.clamp(min=1e-12))
        return torch.where(near, chi, slope) - 1

    zero = torch.zeros_like(q)
    square = moment(activation, q)
    angle = bracketed_root(
        chord, zero, zero + math.pi / 2, w2, q, chi, square, tolerance=1e-13
    )
    return 2 * (angle / 2).sin() ** 2

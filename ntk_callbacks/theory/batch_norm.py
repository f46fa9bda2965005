"""Why gradients explode in wide networks with batch normalization.

Layers h = W φ(BN(h)) and batches of B examples, normalized unit by unit, without bias.
A centered batch is isotropic in B − 1 dimensions at the fixed point: the normalized
batch of a unit is √B times a random direction u there, whatever φ is. With d = φ'(√B u)
and the centering matrix G, the mean square of a gradient grows from layer to layer by

    B/((B − 3) Δ (B − 1)) · E ‖(G − u uᵀ) (d ∘ ξ)‖²,      ξ ~ N(0, G)

where Δ is the difference of the diagonal and the off-diagonal of E φ φᵀ. It is above 1
for every φ: for B → ∞ it is E φ'²/Var φ, and Var φ ≤ E φ'² for a standard normal
argument (Poincaré's inequality).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_callbacks.theory.activations import Activation, elementwise, value_and_slope
from ntk_callbacks.theory.closed_forms import PiecewiseLinear
from ntk_callbacks.theory.expectations import moment
from ntk_callbacks.theory.pieces import NODES, legendre_rule
from ntk_callbacks.theory.quadrature import cuts_for

_REACH = 10.0


@dataclass(frozen=True, slots=True)
class BatchNormField:
    """The fixed point of a network with batch normalization.

    Args:
        q: Mean square of φ after normalization; the variance of the next
            pre-activations is σ_w² times it.
        c: Correlation of two examples of the batch there.
        growth: Factor by which the mean square of a gradient grows from one layer down
            to the next.
    """

    q: Float[Tensor, ""]
    c: Float[Tensor, ""]
    growth: Float[Tensor, ""]


def batch_norm_mean_field(
    activation: Activation, batch_size: int | None = None
) -> BatchNormField:
    """Variance, correlation and gradient growth under batch normalization.

    Gradient growth is (B − 2)/(B − 3) for a linear network and π/(π − 1) for ReLU and
    B → ∞, more at finite B. It does not depend on σ_w, nor on ε → 0.

    Args:
        activation: A name in `ACTIVATIONS` or an elementwise callable φ, not constant.
        batch_size: B, a whole number of at least 4; None for the limit B → ∞.

    Returns:
        `BatchNormField(q, c, growth)`, float64.

    Raises:
        ValueError: If the batch size is out of range (with B = 3 the mean of the growth
            is infinite) or φ is constant.

    Example:
        >>> batch_norm_mean_field("linear", 6).growth
        tensor(1.3333, dtype=torch.float64)
        >>> batch_norm_mean_field("relu").growth
        tensor(1.4669, dtype=torch.float64)

    References:
        Yang, Pennington, Rao, Sohl-Dickstein and Schoenholz (2019), arXiv:1902.08129.
    """
    phi = elementwise(activation)
    if batch_size is None:
        q, slope = moment(phi, 1.0), moment(phi, 1.0, derivative=1)
        mean = moment(phi, 1.0, power=1)
        _check_varies(q - mean**2, q)
        return BatchNormField(q, mean**2 / q, slope / (q - mean**2))
    if not isinstance(batch_size, int) or batch_size < 4:
        raise ValueError(
            f"batch_size is {batch_size!r}, expected a whole number of at least 4, or "
            "None for the limit: with 3 examples or fewer the mean square of a "
            "gradient does not exist."
        )
    b = batch_size
    parts = (
        _homogeneous(phi, b) if isinstance(phi, PiecewiseLinear) else _sphere(phi, b)
    )
    q, shared, own, cross, radial, radial_cross = parts
    _check_varies(q - shared, q)
    # tr(G D G D) and uᵀ D G D u, by their diagonal and off-diagonal terms.
    spread = (1 - 1 / b) ** 2 * b * own + (1 - 1 / b) * cross
    along = b * (1 - 1 / b) * radial - (b - 1) * radial_cross
    growth = b / ((b - 3) * (q - shared)) * (spread - along) / (b - 1)
    return BatchNormField(q, shared / q, growth)


def _check_varies(difference: Tensor, q: Tensor) -> None:
    if not difference > 1e-12 * q:
        raise ValueError(
            "the activation is constant under batch normalization, expected one that "
            "tells examples apart."
        )


def _homogeneous(phi: PiecewiseLinear, b: int) -> list[Tensor]:
    # With y = √B u: E φ(y₁)², E φ(y₁) φ(y₂), E d₁², E d₁ d₂, E d₁² u₁², E d₁ u₁ d₂ u₂.
    # Homogeneous in u, they are those over Gaussians but for the mean square radius.
    one = torch.ones((), dtype=torch.float64)
    cosine = -one / (b - 1)  # of two examples after centering
    square = phi.moment(one, 2, 0)
    mixed = phi.pair(one, one, cosine, 0)
    return [
        square,
        mixed,
        phi.moment(one, 2, 1),
        phi.pair(one, one, cosine, 1),
        square / b,  # d u = φ(u) for a piecewise linear φ
        mixed / b,
    ]


def _sphere(phi: Callable[[Tensor], Tensor], b: int) -> list[Tensor]:
    # The same by quadrature over y₁, and over y₂ given y₁. On the unit sphere of B − 1
    # dimensions y₁ = √(B−1) sin α and y₂ = √(B−1) (ρ sin α + √(1 − ρ²) cos α sin β)
    # with ρ = −1/(B − 1) and densities cos^{B−3} α, cos^{B−4} β.
    radius = math.sqrt(b - 1)
    cosine = -1 / (b - 1)
    sine = math.sqrt(1 - cosine**2)
    cuts = cuts_for(phi, torch.tensor(radius / 13.0, dtype=torch.float64))
    grid = torch.linspace(-1, 1, 1 + 2 * math.ceil(min(radius, _REACH)))
    grid = grid.double() * min(radius, _REACH)
    # At some α a cut begins to be within reach of y₂.
    within = (cuts[cuts.abs() <= radius] / radius).asin()
    turn = math.acos(cosine)
    meets = torch.cat([within + turn, within - turn, -within + turn, -within - turn])
    breaks = torch.cat([grid / radius, cuts / radius, meets.sin()])
    alpha, outer = _angles(breaks[None], b - 3)
    first = radius * alpha.sin()
    width = radius * sine * alpha.cos()
    rest = torch.cat([grid / radius * width.mT, cuts - cosine * first.mT], 1)
    beta, inner = _angles(rest / width.mT, b - 4)
    second = cosine * first.mT + width.mT * beta.sin()
    weights = outer.mT * inner
    value1, slope1 = (part.mT for part in value_and_slope(phi, first))
    value2, slope2 = value_and_slope(phi, second)
    u1, u2 = first.mT / math.sqrt(b), second / math.sqrt(b)
    integrands = [
        value1**2,
        value1 * value2,
        slope1**2,
        slope1 * slope2,
        (slope1 * u1) ** 2,
        slope1 * u1 * slope2 * u2,
    ]
    return [(weights * integrand).sum() for integrand in integrands]


def _angles(sines: Tensor, power: int) -> tuple[Tensor, Tensor]:
    """Nodes between the arcsines of each row, weighted by cos^power; they sum to 1."""
    bounds = sines.new_tensor([-1.0, 1.0]).expand(len(sines), 2)
    breaks = torch.cat([sines.clamp(-1, 1), bounds], 1).asin().sort(1).values
    nodes, weights = legendre_rule(NODES)
    middle = (breaks[:, 1:] + breaks[:, :-1]) / 2
    half = (breaks[:, 1:] - breaks[:, :-1]) / 2
    angles = (middle[..., None] + half[..., None] * nodes).flatten(1)
    density = (half[..., None] * weights).flatten(1) * angles.cos() ** power
    return angles, density / density.sum(1, keepdim=True)

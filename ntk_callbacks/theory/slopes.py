"""How the squared slope φ'(√q z)² of a layer's units is distributed.

In a wide layer the units' slopes are the diagonal of D in the input-output Jacobian
∏ D W; its spectrum depends on them through the moments E φ'^{2k} alone.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from ntk_callbacks.theory.activations import Activation, elementwise, value_and_slope
from ntk_callbacks.theory.closed_forms import PiecewiseLinear
from ntk_callbacks.theory.quadrature import (
    REACH,
    cuts_for,
    gaussian_breaks,
    gaussian_nodes,
)

_NEGLIGIBLE = 1e-17


@dataclass(frozen=True, slots=True)
class SquaredSlopes:
    """A distribution of D² = φ'², as values with weights.

    Args:
        values: φ'² ≥ 0, ascending.
        weights: Their shares, which add up to 1; exact for a piecewise linear φ, nodes
            of a quadrature otherwise.
        largest: The largest φ'² on the whole line, which may be far out; infinite if
            it keeps growing.
    """

    values: Float[Tensor, " m"]
    weights: Float[Tensor, " m"]
    largest: Float[Tensor, ""]

    def moment(self, k: int) -> Float[Tensor, ""]:
        """μ_k = E φ'^{2k}."""
        return (self.weights * self.values**k).sum()

    def generating_function(
        self, x: Complex[Tensor, " g"] | Float[Tensor, " g"]
    ) -> Complex[Tensor, " g"] | Float[Tensor, " g"]:
        """ψ(x) = Σ_k μ_k x^k = E x φ'²/(1 − x φ'²)."""
        scaled = x[:, None] * self.values
        return (self.weights * scaled / (1 - scaled)).sum(1)

    def generating_slope(
        self, x: Complex[Tensor, " g"] | Float[Tensor, " g"]
    ) -> Complex[Tensor, " g"] | Float[Tensor, " g"]:
        """ψ'(x) = E φ'²/(1 − x φ'²)²."""
        return (self.weights * self.values / (1 - x[:, None] * self.values) ** 2).sum(1)


def squared_slopes(
    activation: Activation, q: Float[Tensor, ""] | float, *, panels: int = 1
) -> SquaredSlopes:
    """The distribution of φ'(√q z)² for standard normal z.

    Args:
        activation: A name in `ACTIVATIONS` or an elementwise callable φ.
        q: Variance of the pre-activations, > 0.
        panels: Quadrature panels to a standard deviation.

    Returns:
        `SquaredSlopes`.

    Raises:
        ValueError: If the activation is unknown or not piecewise smooth.

    Example:
        >>> squared_slopes("relu", 1.0).weights
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    phi = elementwise(activation)
    variance = torch.as_tensor(q, dtype=torch.float64)
    if isinstance(phi, PiecewiseLinear):
        slopes = torch.tensor([phi.positive, phi.negative], dtype=torch.float64)
        squares = slopes**2
        return _collected(squares, torch.full_like(slopes, 0.5), squares.max())
    deviation = variance.sqrt()
    breaks = gaussian_breaks(deviation.view(1, 1), cuts_for(phi, deviation))[0]
    shares = torch.arange(panels, dtype=torch.float64) / panels
    inner = breaks[:-1, None] + breaks.diff()[:, None] * shares
    z, weights = gaussian_nodes(torch.cat([inner.flatten(), breaks[-1:]]))
    seen = weights > _NEGLIGIBLE
    _, slopes = value_and_slope(phi, z[seen] * deviation)
    far = deviation * REACH * torch.logspace(-2, 6, 800, dtype=torch.float64)
    _, outside = value_and_slope(phi, torch.stack([-far, far]))
    reached = outside.square().amax(0).cummax(0).values
    # Six decades out φ' has settled, unless it grows without bound.
    settled = reached[-1] <= 1.01 * reached[600]
    largest = torch.maximum(reached[-1], slopes.square().max())
    return _collected(
        slopes**2,
        weights[seen] / weights[seen].sum(),
        torch.where(settled, largest, torch.inf),
    )


def _collected(values: Tensor, weights: Tensor, largest: Tensor) -> SquaredSlopes:
    """Equal values taken together, so that atoms are seen as such."""
    distinct, where = torch.unique(values, return_inverse=True)
    together = torch.zeros_like(distinct).index_add(0, where, weights)
    return SquaredSlopes(distinct, together, largest)

"""Depth scales: how many layers a signal takes to settle."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_FEWEST = 5  # two more than the parameters of the curve
_SHORTEST = 0.2  # layers: e⁻⁵ is left after one
_GRID = 200
_ZOOMS = 6


@dataclass(frozen=True, slots=True)
class DepthScaleFit:
    """The exponential v* + a exp(−l/ξ) through numbers by depth l.

    Args:
        xi: ξ, layers in which the distance to the limit falls to 1/e; NaN if no fit.
        limit: v*; NaN if no fit.
        r_squared: Share of the variance of the numbers that the curve explains; 0 if
            no curve could be drawn.
    """

    xi: float
    limit: float
    r_squared: float


def depth_scale_fit(
    values: Float[Tensor, " l"], *, least_r_squared: float = 0.9
) -> DepthScaleFit:
    """ξ, v* and a of v_l = v* + a exp(−l/ξ), by least squares.

    For each ξ the other two follow from a linear regression, and ξ is searched on
    [0.2, number of layers]. There is no fit for fewer than five layers, if ξ lies at an
    end of the range (nothing decays, or not within this depth), if the curve explains
    too little, or if a value is not finite.

    Args:
        values: One number for each layer, in the order of depth.
        least_r_squared: Smallest share of the variance that counts as a fit.

    Returns:
        `DepthScaleFit(xi, limit, r_squared)`, ξ in (0.2, number of layers) or NaN.

    Example:
        >>> values = 2 + 3 * torch.exp(-torch.arange(10.0) / 4)
        >>> fit = depth_scale_fit(values.double())
        >>> round(fit.xi, 4), round(fit.limit, 4)
        (4.0, 2.0)

    References:
        Schoenholz et al. 2017, arXiv:1611.01232, who fit the same exponentials.
    """
    values = values.detach().double().cpu()
    count = len(values)
    if count < _FEWEST or not values.isfinite().all():
        return DepthScaleFit(torch.nan, torch.nan, 0.0)
    centered = values - values.mean()
    total = centered.square().sum()
    # Round-off of equal numbers is no signal.
    if total <= count * (1e-12 * values.abs().max()) ** 2:
        return DepthScaleFit(torch.nan, torch.nan, 0.0)
    low, high = (torch.tensor(end).double().log() for end in (_SHORTEST, float(count)))
    first, last = low, high
    for _ in range(_ZOOMS):
        grid = torch.linspace(float(low), float(high), _GRID, dtype=torch.float64)
        curves = _curves(grid, count)
        products = curves @ centered
        explained = products.square() / curves.square().sum(1)
        best = int(explained.argmax())
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, _GRID - 1)]
    r_squared = float(explained[best] / total)
    inside = first + 1e-3 < grid[best] < last - 1e-3
    if not inside or r_squared < least_r_squared:
        return DepthScaleFit(torch.nan, torch.nan, r_squared)
    xi = grid[best].exp()
    scale = products[best] / curves[best].square().sum()
    mean = torch.exp(-torch.arange(count) / xi).mean()
    return DepthScaleFit(float(xi), float(values.mean() - scale * mean), r_squared)


def _curves(log_xi: Float[Tensor, " g"], count: int) -> Float[Tensor, "g l"]:
    """exp(−l/ξ) less its mean over l, for each ξ."""
    depth = torch.arange(count, dtype=torch.float64)
    curves = torch.exp(-depth / log_xi.exp()[:, None])
    return curves - curves.mean(1, keepdim=True)

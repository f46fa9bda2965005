"""Gaussian integrals of piecewise smooth activations, with an error that is checked.

Panels end where the activation has its cuts (`smooth_pieces`) and are at most one
standard deviation wide; on each, Gauss-Legendre quadrature with 16 nodes is compared
with 12, and panels are halved until the two agree to 1e-9 of the integral of |g|.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_callbacks.theory.pieces import NODES, legendre_rule, smooth_pieces

REACH = 13.0
"""Standard deviations covered on either side: exp(−REACH²/4) is below 1e-18."""
_TOLERANCE = 1e-9
_BLOCK = 2**22
"""Nodes evaluated at a time: 32 MB for each intermediate result."""


def line_expectation(
    integrand: Callable[[Tensor, Tensor], Tensor],
    deviations: Float[Tensor, "b k"],
    cuts: Float[Tensor, " m"],
) -> Float[Tensor, " b"]:
    """E g(z) for standard normal z and each row of a batch.

    Args:
        integrand: Maps the nodes z (b, m) and the rows of `deviations` they belong to
            (b, k) to g (b, m); smooth in z except where σ z is a cut for one of the
            row's σ.
        deviations: The σ of each row.
        cuts: Places where the activation is not smooth.

    Returns:
        One number a row, to 1e-9 of E |g|.

    Raises:
        ValueError: If the two rules do not agree on the finest panels, or g grows so
            fast that what lies beyond `REACH` matters.
    """
    per_row = (len(cuts) * deviations.shape[1] + 2 * REACH) * (NODES + 12)
    rows = max(1, int(_BLOCK / per_row))
    parts = [_line(integrand, part, cuts) for part in torch.split(deviations, rows)]
    return torch.cat(parts) if parts else deviations.new_zeros(0)


def _line(
    integrand: Callable[[Tensor, Tensor], Tensor], deviations: Tensor, cuts: Tensor
) -> Tensor:
    breaks = gaussian_breaks(deviations, cuts)
    for _ in range(4):
        fine, size, edge = _rule(integrand, deviations, breaks, NODES)
        coarse, _, _ = _rule(integrand, deviations, breaks, 12)
        if not ((edge <= 1e-12 * size) | (size == 0)).all():
            raise ValueError(
                f"an expectation over a Gaussian of deviation "
                f"{deviations.max().item():.4g} does not converge: the activation is "
                "not finite or grows too fast (expected less than exponential growth)."
            )
        if ((fine - coarse).abs() <= _TOLERANCE * size).all():
            return fine
        middles = (breaks[:, 1:] + breaks[:, :-1]) / 2
        breaks = torch.cat([breaks, middles], 1).sort(1).values
    raise ValueError(
        f"quadrature with {breaks.shape[1]} panels is off by "
        f"{(fine - coarse).abs().max().item():.1e}, expected {_TOLERANCE:g} or less: "
        "the activation is not piecewise smooth enough."
    )


def _rule(
    integrand: Callable[[Tensor, Tensor], Tensor],
    deviations: Tensor,
    breaks: Tensor,
    count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The integral of g, of |g|, and of |g| over the outermost deviation."""
    z, weights = gaussian_nodes(breaks, count)
    terms = weights * integrand(z, deviations)
    edge = terms.abs() * (z.abs() > REACH - 1)
    return terms.sum(1), terms.abs().sum(1), edge.sum(1)


def gaussian_breaks(
    deviations: Float[Tensor, "b k"], cuts: Float[Tensor, " m"]
) -> Float[Tensor, "b n"]:
    """Panels for z: whole numbers, and the cuts of each σ z."""
    grid = torch.arange(-REACH, REACH + 1, dtype=torch.float64)
    found = (cuts / deviations[:, :, None]).flatten(1).clamp(-REACH, REACH)
    grid = grid.expand(len(deviations), -1)
    return torch.cat([grid, found], 1).sort(1).values


def gaussian_nodes(
    breaks: Float[Tensor, "... n"], count: int = NODES
) -> tuple[Float[Tensor, "... m"], Float[Tensor, "... m"]]:
    """Nodes of a composite rule and weights that hold the standard normal density."""
    nodes, weights = legendre_rule(count)
    middle = (breaks[..., 1:] + breaks[..., :-1]) / 2
    half = (breaks[..., 1:] - breaks[..., :-1]) / 2
    z = (middle[..., None] + half[..., None] * nodes).flatten(-2)
    w = (half[..., None] * weights).flatten(-2)
    return z, w * (-(z**2) / 2).exp() / math.sqrt(2 * math.pi)


def cuts_for(
    activation: Callable[[Tensor], Tensor], deviations: Float[Tensor, "..."]
) -> Float[Tensor, " m"]:
    """The cuts of an activation as far as Gaussians of these deviations reach."""
    largest = deviations.max().item() if deviations.numel() else 1.0
    return smooth_pieces(activation, REACH * largest)

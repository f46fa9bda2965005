"""Where an activation is smooth: the real line cut into pieces that a polynomial fits.

The cuts depend on the activation alone, so that one search serves integrals against
Gaussians of every width. A kink is found by bisection, to about 1e-14.
"""

import math
from collections.abc import Callable
from functools import cache, lru_cache

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ntk_callbacks.theory.activations import check_elementwise, value_and_slope

NODES = 16
_TOLERANCE = 1e-12
_NARROW = 2.0**-46
_MOST_PIECES = 4096


@cache
def legendre_rule(count: int) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
    """Nodes and weights of Gauss-Legendre quadrature on [−1, 1], float64.

    Golub and Welsch (1969): eigenvalues of the Jacobi matrix, weights from its
    eigenvectors.

    Args:
        count: Number of nodes.

    Returns:
        Nodes in increasing order, and weights that sum to 2.
    """
    k = torch.arange(1, count, dtype=torch.float64)
    off_diagonal = k / (4 * k**2 - 1).sqrt()
    matrix = torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1)
    nodes, vectors = torch.linalg.eigh(matrix)
    nodes = (nodes - nodes.flip(0)) / 2  # symmetric to the last bit
    weights = 2 * vectors[0] ** 2
    return nodes, (weights + weights.flip(0)) / 2


def smooth_pieces(
    activation: Callable[[Tensor], Tensor], reach: float
) -> Float[Tensor, " m"]:
    """Cuts between which φ and φ' are polynomials of degree 15, to 1e-12.

    The error of a piece is measured by interpolation at 17 further points, relative to
    the largest |φ| nearer to 0. What happens between points, a spike narrower than
    about 0.01 away from 0, is not seen.

    Args:
        activation: φ, elementwise, in float64.
        reach: How far from 0 the line must be covered.

    Returns:
        Increasing cuts from at most −`reach` to at least `reach`, 0 among them.

    Raises:
        ValueError: If φ is not elementwise, not finite, jumps, or is not piecewise
            smooth.
    """
    octave = 2.0 ** math.ceil(math.log2(max(reach, 16.0)))
    if isinstance(activation, nn.Module):  # its parameters may change
        return _search(activation, octave)
    try:
        return _remembered(activation, octave)
    except TypeError:  # not hashable
        return _search(activation, octave)


def _search(activation: Callable[[Tensor], Tensor], reach: float) -> Tensor:
    check_elementwise(activation)
    near = torch.linspace(-8.0, 8.0, 17, dtype=torch.float64)
    far = 16.0 * 2.0 ** torch.arange(math.log2(reach) - 3, dtype=torch.float64)
    # A steep rise at 0 would pass for a kink there.
    close = 2.0 ** -torch.arange(1.0, 30.0, dtype=torch.float64)
    start = torch.cat([-far, -close, near, close, far]).sort().values
    sizes = _Sizes(activation, reach)
    cuts, kinks = _bisected(activation, start, sizes)
    if len(kinks):
        # Once a kink is a cut, the narrow pieces that led to it are not needed.
        start = torch.cat([start, kinks]).sort().values
        cuts, _ = _bisected(activation, start, sizes)
    cuts = _merged(activation, cuts, sizes)
    _check_jumps(activation, cuts, sizes)
    return cuts


_remembered = lru_cache(maxsize=64)(_search)


class _Sizes:
    """The largest |φ| and |φ'| up to a distance from 0: errors are relative to it."""

    def __init__(self, activation: Callable[[Tensor], Tensor], reach: float) -> None:
        steps = torch.linspace(-9.0, math.log10(reach), 800, dtype=torch.float64)
        self.distances = 10.0**steps
        both = torch.stack([-self.distances, self.distances])
        value, slope = value_and_slope(activation, both)
        broken = ~(value.isfinite() & slope.isfinite())
        if broken.any():
            place = both[broken][both[broken].abs().argmin()].item()
            raise ValueError(
                f"the activation or its derivative is not finite at {place:.3g}; "
                f"expected finite values between ±{reach:g}, as far as arguments of "
                "this variance reach."
            )
        self.largest = torch.stack([value, slope]).abs().amax(1).cummax(-1).values

    def upto(self, distance: Tensor) -> Tensor:
        index = torch.searchsorted(self.distances, distance)
        return self.largest[:, index.clamp(max=len(self.distances) - 1)]


def _bisected(
    activation: Callable[[Tensor], Tensor], start: Tensor, sizes: _Sizes
) -> tuple[Tensor, Tensor]:
    """All cuts, and the middles of the narrow pieces that no polynomial fits."""
    left, right = start[:-1], start[1:]
    cuts, kinks = [start], [start[:0]]
    count = len(start)
    others, _ = legendre_rule(NODES + 1)
    while len(left):
        middle, half = (left + right) / 2, (right - left) / 2
        points = _spread(others, left, right)
        rough = ~_fits(activation, left, right, points, sizes)
        narrow = half < _NARROW * middle.abs().clamp(min=1)
        kinks.append(middle[rough & narrow])
        split = rough & ~narrow
        cuts.append(middle[split])
        count += int(split.sum())
        if count > _MOST_PIECES:
            raise ValueError(
                "the activation is not piecewise smooth: no polynomial fits it to "
                f"{_TOLERANCE:g} near {middle[split][0].item():.6g} even on pieces of "
                f"width {2 * half[split][0].item():.1g}. Is it computed in float64?"
            )
        left, right = (
            torch.cat([left[split], middle[split]]),
            torch.cat([middle[split], right[split]]),
        )
    return torch.unique(torch.cat(cuts)), torch.cat(kinks).sort().values


def _merged(
    activation: Callable[[Tensor], Tensor], cuts: Tensor, sizes: _Sizes
) -> Tensor:
    """The cuts without those that separate pieces of one polynomial."""
    others, _ = legendre_rule(NODES + 1)
    needed = len(cuts) + 1
    while len(cuts) < needed:
        needed = len(cuts)
        for first in (1, 2):
            index = torch.arange(first, len(cuts) - 1, 2)
            index = index[cuts[index] != 0]
            left, middle, right = cuts[index - 1], cuts[index], cuts[index + 1]
            # One of two pieces may be too short to be seen among points of the whole.
            points = torch.cat(
                [_spread(others, left, middle), _spread(others, middle, right)]
            )
            fits = _fits(activation, left, right, points, sizes)
            keep = torch.ones(len(cuts), dtype=torch.bool)
            keep[index[fits]] = False
            cuts = cuts[keep]
    return cuts


def _fits(
    activation: Callable[[Tensor], Tensor],
    left: Tensor,
    right: Tensor,
    points: Tensor,
    sizes: _Sizes,
) -> Tensor:
    """Whether the polynomial through 16 nodes of a piece agrees at points of it."""
    nodes, _ = legendre_rule(NODES)
    places = _spread(nodes, left, right)
    at = torch.stack(value_and_slope(activation, places))
    there = torch.stack(value_and_slope(activation, points))
    gaps = nodes[:, None] - nodes
    weights = 1 / (gaps + torch.eye(NODES, dtype=gaps.dtype)).prod(1)
    # The barycentric formula, (points, nodes, pieces); a point on a node is that node.
    terms = points[:, None] - places
    terms = weights[:, None] / terms.where(terms != 0, 1e-300)
    guess = torch.einsum("pnk,dnk->dpk", terms / terms.sum(1, keepdim=True), at)
    # Very near to 0 an activation such as exp(x) − 1 is mostly round-off.
    scale = sizes.upto(torch.maximum(left.abs(), right.abs()).clamp(min=0.01))
    scale = torch.maximum(scale, there.abs().amax(1))
    return ((guess - there).abs().amax(1) <= _TOLERANCE * scale).all(0)


def _spread(unit: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Points of [−1, 1] moved into each of the pieces, (points, pieces)."""
    return (left + right) / 2 + (right - left) / 2 * unit[:, None]


def _check_jumps(
    activation: Callable[[Tensor], Tensor], cuts: Tensor, sizes: _Sizes
) -> None:
    step = 1e-9 * cuts.abs().clamp(min=1)
    value, slope = value_and_slope(activation, torch.stack([cuts - step, cuts + step]))
    gap = (value[1] - value[0]).abs()
    # What a slope explains, and twice the root of the step, of which a root is capable.
    allowed = 3 * step * slope.abs().amax(0) + 1e-4 * sizes.upto(cuts.abs() + 1)[0]
    if (gap > allowed).any():
        raise ValueError(
            f"the activation jumps by {gap.max().item():.3g} at "
            f"{cuts[gap.argmax()].item():.6g}: its derivative has no mean square, "
            "and neither the kernel nor gradients have a limit of infinite width."
        )

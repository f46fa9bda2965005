"""E φ(u) φ(v) of two correlated Gaussians, where there is no closed form.

With φ(√q z) = Σₖ aₖ(q) hₖ(z) in normalized Hermite polynomials, Mehler's formula gives
E φ(u) φ(v) = Σₖ aₖ(q1) aₖ(q2) ρᵏ: one short sum for each pair. What is cut off is at
most |ρ|ᴷ √(tail(q1) tail(q2)) with tail(q) = E φ² − Σ aₖ², which is known. Pairs for
which this bound is too large (nearly parallel arguments of a kinked φ', saturated ones)
are integrated in the plane.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ntk_callbacks.theory.activations import value_and_slope
from ntk_callbacks.theory.closed_forms import remainder
from ntk_callbacks.theory.pieces import NODES
from ntk_callbacks.theory.quadrature import (
    REACH,
    cuts_for,
    gaussian_breaks,
    gaussian_nodes,
    line_expectation,
)

_TERMS = 192
_TOLERANCE = 1e-10
_CHECKED = 1e-9
_SMALLEST = 1e-100
_BLOCK = 2**22


def pair_expectation(
    phi: Callable[[Tensor], Tensor],
    q1: Tensor,
    q2: Tensor,
    q12: Tensor,
    derivative: int,
) -> Tensor:
    """E φ(u) φ(v), or of φ', by Mehler's formula or by quadrature.

    Args:
        phi: φ, elementwise.
        q1: Variances of u.
        q2: Variances of v.
        q12: Covariances, at most √(q1 q2) in size, of the broadcast shape.
        derivative: 0 for φ, 1 for φ'.

    Returns:
        Values of the shape of `q12`, to 1e-9 of √(E φ(u)² E φ(v)²).
    """
    shape = q12.shape
    scale = (q1 * q2).sqrt()
    cosine = torch.where(scale > 0, q12 / scale, ((q1 + q2) == 0).double())
    sine = torch.where(scale > 0, remainder(q1, q2, q12) / scale, 1 - cosine)
    deviations = torch.cat([q1.flatten(), q2.flatten()]).clamp(min=_SMALLEST).sqrt()
    distinct, where = torch.unique(deviations, return_inverse=True)
    first = where[: q1.numel()].view(q1.shape).expand(shape).reshape(-1)
    second = where[q1.numel() :].view(q2.shape).expand(shape).reshape(-1)
    cosine, sine = cosine.reshape(-1), sine.reshape(-1)

    series = _Series.of(phi, distinct, derivative)
    value, bound = series.pairs(first, second, cosine)
    hard = bound > _TOLERANCE * series.size(first, second)
    if hard.any():
        plane = Plane(phi, derivative, cuts_for(phi, distinct))
        # E φ(u) φ(v) is symmetric: so are the numbers, bit for bit, and half as many.
        low, high = torch.minimum(first, second), torch.maximum(first, second)
        size = series.size(low, high)
        asked = torch.stack([distinct[low], distinct[high], cosine, sine, size], 1)
        asked = asked[hard]
        pairs, back = torch.unique(asked, dim=0, return_inverse=True)
        value[hard] = plane.expectation(*pairs.unbind(1))[back]
    return value.view(shape)


def _evaluated(phi: Callable[[Tensor], Tensor], x: Tensor, derivative: int) -> Tensor:
    if derivative:
        return value_and_slope(phi, x)[1]
    with torch.no_grad():
        return phi(x.clone())


@dataclass(frozen=True, slots=True)
class _Series:
    """Hermite coefficients (variances × terms), mean squares and tails."""

    coefficients: Tensor
    square: Tensor
    tail: Tensor

    @classmethod
    def of(
        cls, phi: Callable[[Tensor], Tensor], deviations: Tensor, derivative: int
    ) -> "_Series":
        cuts = cuts_for(phi, deviations)

        def squared(z: Tensor, deviation: Tensor) -> Tensor:
            return _evaluated(phi, z * deviation, derivative) ** 2

        # This one checks its error, on the same panels.
        square = line_expectation(squared, deviations[:, None], cuts)
        nodes = (len(cuts) + 2 * REACH) * NODES
        blocks = torch.split(deviations, max(1, int(_BLOCK / nodes)))
        coefficients = torch.cat(
            [_hermite_coefficients(phi, block, cuts, derivative) for block in blocks]
        )
        tail = (square - (coefficients**2).sum(1)).clamp(min=0)
        return cls(coefficients, square, tail)

    def pairs(self, i: Tensor, j: Tensor, cosine: Tensor) -> tuple[Tensor, Tensor]:
        value = torch.zeros_like(cosine)
        for a in reversed(self.coefficients.unbind(1)):
            value = value * cosine + a[i] * a[j]
        bound = cosine.abs() ** _TERMS * (self.tail[i] * self.tail[j]).sqrt()
        return value, bound

    def size(self, i: Tensor, j: Tensor) -> Tensor:
        return (self.square[i] * self.square[j]).sqrt()


def _hermite_coefficients(
    phi: Callable[[Tensor], Tensor], deviations: Tensor, cuts: Tensor, derivative: int
) -> Tensor:
    z, weights = gaussian_nodes(gaussian_breaks(deviations[:, None], cuts))
    weighted = weights * _evaluated(phi, z * deviations[:, None], derivative)
    before, now = torch.zeros_like(z), torch.ones_like(z)
    found = []
    for k in range(_TERMS):
        found.append((weighted * now).sum(1))
        following = (z * now - k**0.5 * before) / (k + 1) ** 0.5
        before, now = now, following
    return torch.stack(found, 1)


@dataclass(frozen=True, slots=True)
class Plane:
    """Iterated quadrature over u and over v given u, with its error looked at."""

    phi: Callable[[Tensor], Tensor]
    derivative: int
    cuts: Tensor

    def expectation(
        self, first: Tensor, second: Tensor, cosine: Tensor, sine: Tensor, size: Tensor
    ) -> Tensor:
        """For deviations σ₁, σ₂, the cosine and sine of the angle, and √(E φ² E φ²)."""
        value = torch.empty_like(cosine)
        aligned = sine == 0
        both = torch.stack([first, cosine * second], 1)
        value[aligned] = line_expectation(self._aligned, both[aligned], self.cuts)
        pairs = torch.stack([first, second, cosine, sine], 1)
        for i in (~aligned).nonzero()[:, 0].tolist():
            value[i] = self._checked(pairs[i], _CHECKED * size[i])
        return value

    def _checked(self, pair: Tensor, tolerance: Tensor) -> Tensor:
        for halvings in range(4):
            fine = self._crossed(pair, NODES, halvings)
            if (fine - self._crossed(pair, 12, halvings)).abs() <= tolerance:
                return fine
        raise ValueError(
            f"the expectation of a pair with correlation {pair[2].item():.6g} is not "
            f"found to {_CHECKED:g}: the activation is not piecewise smooth enough."
        )

    def _aligned(self, z: Tensor, deviations: Tensor) -> Tensor:
        u, v = z * deviations[:, :1], z * deviations[:, 1:]
        return self._at(u) * self._at(v)

    def _at(self, x: Tensor) -> Tensor:
        return _evaluated(self.phi, x, self.derivative)

    def _crossed(self, pair: Tensor, count: int, halvings: int) -> Tensor:
        """One pair: v = σ₂ (ρ z + √(1 − ρ²) y) with z for u and y of its own."""
        first, second, cosine, sine = pair
        breaks = gaussian_breaks(first.view(1, 1), self.cuts)[0]
        # E[φ(v) | u] turns within a layer about each cut of v, √(1 − ρ²)/|ρ| wide.
        steps = torch.tensor([-8.0, -6, -4, -2, 0, 2, 4, 6, 8], dtype=torch.float64)
        centers = self.cuts / (second * cosine)
        layers = centers[:, None] + steps * (sine / cosine.abs())
        breaks = torch.cat([breaks, layers.flatten().clamp(-REACH, REACH)])
        breaks = torch.unique(breaks)
        for _ in range(halvings):
            middles = (breaks[1:] + breaks[:-1]) / 2
            breaks = torch.cat([breaks, middles]).sort().values
        z, weights = gaussian_nodes(breaks, count)
        outer = weights * self._at(first * z)
        shift = z * cosine / sine
        places = self.cuts / (second * sine)
        grid = torch.arange(-REACH, REACH + 1, 2, dtype=torch.float64)
        total = torch.zeros((), dtype=torch.float64)
        rows = max(1, _BLOCK // ((len(grid) + len(places)) * count))
        for part, shifts in zip(
            torch.split(outer, rows), torch.split(shift, rows), strict=True
        ):
            inner = (places - shifts[:, None]).clamp(-REACH, REACH)
            inner = torch.cat([grid.expand(len(shifts), -1), inner], 1).sort(1).values
            y, density = gaussian_nodes(inner, count)
            v = second * sine * (shifts[:, None] + y)
            total = total + (part * (density * self._at(v)).sum(1)).sum()
        return total

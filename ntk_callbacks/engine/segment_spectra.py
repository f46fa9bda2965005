"""Size and extremes of the singular values of ∂(end)/∂(start), wide or narrow."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, compress, groupby

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ntk_callbacks.engine.bidiagonal import extreme_singular_values
from ntk_callbacks.engine.segment_jacobians import LARGEST_BLOCK, Pair, jacobians
from ntk_callbacks.engine.segments import Place, Segment, pulled_back
from ntk_callbacks.engine.spectral import singular_values
from ntk_callbacks.layout import widened

WIDEST_FORMED = 256
"""The smaller side of a Jacobian up to which it is formed, and everything is exact."""
_SAMPLES = 16


@dataclass(frozen=True, slots=True)
class SegmentSpectra:
    """Singular values s of k Jacobians of n examples, r = min(c, d) values each.

    Exact where the Jacobian is formed: r ≤ 256, and all examples fit into 2²⁶ numbers.
    Beyond that it is only multiplied with: ⟨s²⟩ = E‖Jᵀz‖²/r over 16 vectors z of random
    signs, a relative error of √(2/16r_eff) or less, r_eff the participation ratio of
    s²; s_max and s_min by `extreme_singular_values`, ≤ 64 steps, NaN where these have
    not brought the residual below 10⁻³ s: s_max seldom, s_min often.

    Args:
        mean_square: ⟨s²⟩ over the r values.
        largest: s_max.
        smallest: s_min.
        formed: Whether the Jacobian was formed.
    """

    mean_square: Float[Tensor, "k n"]
    largest: Float[Tensor, "k n"]
    smallest: Float[Tensor, "k n"]
    formed: Bool[Tensor, " k"]

    @property
    def condition_number(self) -> Float[Tensor, "k n"]:
        """s_max/s_min, in [1, ∞]."""
        return self.largest / self.smallest

    @property
    def isometry_gap(self) -> Float[Tensor, "k n"]:
        """Largest |s²/⟨s²⟩ − 1|, the spectral norm of J Jᵀ/⟨s²⟩ − 1; 0: isometry."""
        ends = torch.stack([self.largest, self.smallest])
        return (ends.square() / self.mean_square - 1).abs().amax(0)

    @classmethod
    def joined(cls, parts: "list[SegmentSpectra]") -> "SegmentSpectra":
        """The examples of several measurements of the same Jacobians."""
        return cls(
            torch.cat([part.mean_square for part in parts], 1),
            torch.cat([part.largest for part in parts], 1),
            torch.cat([part.smallest for part in parts], 1),
            torch.stack([part.formed for part in parts]).all(0),
        )


def segment_spectra(
    pairs: Sequence[Pair], examples: int, joint: bool, *, products: bool = True
) -> SegmentSpectra:
    """Spectra of ∂(end)/∂(start) for every pair, in order.

    Args:
        pairs: Starts and ends; neighbors that share one of them share the work.
        examples: How many examples have a Jacobian: the first ones.
        joint: Whether examples depend on one another.
        products: Whether the extremes of Jacobians too wide to be formed are looked
            for, which takes up to 64 products each way; else these are NaN.

    Returns:
        k is the number of pairs.
    """
    if not pairs:
        empty = torch.zeros(0, examples, dtype=torch.float64)
        return SegmentSpectra(empty, empty, empty, torch.zeros(0, dtype=torch.bool))
    fits = [_is_formed(*pair, examples) for pair in pairs]
    blocks = jacobians(list(compress(pairs, fits)), examples, joint)
    wide = compress(pairs, [not fit for fit in fits])
    means = chain.from_iterable(
        _mean_squares(list(sharing), examples, joint)
        for _, sharing in groupby(wide, lambda pair: id(pair[1]))
    )
    rows: list[list[Tensor]] = []
    for (start, end), fit in zip(pairs, fits, strict=True):
        if fit:
            rows.append(_exact(next(blocks)))
            continue
        row = [next(means), *[torch.full((examples,), torch.nan).double()] * 2]
        if products and start.is_known and end.is_known:
            row[1:] = _extremes(Segment(start, end, examples, joint))
        rows.append(row)
    size, largest, smallest = (torch.stack(found) for found in zip(*rows, strict=True))
    return SegmentSpectra(size, largest, smallest, torch.tensor(fits))


def _is_formed(start: Place, end: Place, examples: int) -> bool:
    c, d = end.size, start.size
    return min(c, d) <= WIDEST_FORMED and examples * c * d <= LARGEST_BLOCK


def _exact(jacobian: Float[Tensor, "n c d"]) -> list[Tensor]:
    s = singular_values(jacobian).cpu()
    return [s.square().mean(1), s[:, 0], s[:, -1]]


def _mean_squares(
    sharing: list[Pair], examples: int, joint: bool
) -> Iterator[Float[Tensor, " n"]]:
    """‖J‖²/r from E‖Jᵀz‖², the same z for all starts, which share the end."""
    starts, end = [start for start, _ in sharing], sharing[0][1]
    generator = torch.Generator().manual_seed(0)
    totals = [torch.zeros(examples, dtype=torch.float64) for _ in starts]
    for _ in range(_SAMPLES):
        shape = examples, end.size
        z = torch.randint(2, shape, generator=generator) * 2.0 - 1
        rows = pulled_back(starts, end, z.to(end.like), joint)
        totals = [
            total + widened(row).square().sum(1).cpu()
            for total, row in zip(totals, rows, strict=True)
        ]
    return iter(
        total / (_SAMPLES * min(start.size, end.size))
        for total, start in zip(totals, starts, strict=True)
    )


def _extremes(segment: Segment) -> list[Tensor]:
    shape = (segment.examples, *segment.shape)
    found = extreme_singular_values(
        segment.times, segment.transposed, shape, like=segment.start.like
    )
    return [
        found.largest.masked_fill(~found.largest_converged, torch.nan),
        found.smallest.masked_fill(~found.smallest_converged, torch.nan),
    ]

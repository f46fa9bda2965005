"""From gradients at the taps to kernels: the ways to contract one weight.

Everywhere o outputs, n examples, t positions, weights c×d; `left` and `right` are the
rows and the columns of the kernel. The routes give the same numbers:

- *materialized*: the rows of J, a block of columns at a time, then their products;
  R·t·d·c + R²·c·d multiply-adds for R = n·o.
- *paired*: Σ over positions t, t' of (a aᵀ) ⊙ (g gᵀ); no gradient is ever formed.
- *factored*: (a aᵀ) applied to g, then contracted with g, for each pair of examples.

Of a kernel of one side with itself only the upper triangle is sure to be there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ntk_callbacks._types import Kernel
from ntk_callbacks.engine.factors import Outer
from ntk_callbacks.layout import mirror_

_CACHED = 2**20
"""Numbers that stay in a processor's cache from one product to the next."""

Contracted: TypeAlias = Literal["full", "trace", "diagonal"]


@dataclass(frozen=True)
class Strand:
    """One use of a weight on one side of the kernel.

    Args:
        use: How gradients become rows of J.
        g: For each output, the gradient `(n, q, t, c)`.
        positions: Those of t that g is given for; None for all of them.
    """

    use: Outer
    g: list[Tensor]
    positions: Tensor | None = None

    def a(self, examples: slice, columns: slice = slice(None)) -> Tensor:
        """`(m, q, t, …)` of some examples and columns."""
        a = self.use.a(examples, columns)
        return a if self.positions is None else a[:, :, self.positions]

    def shortened(self) -> "Strand":
        """The same without the positions that no output depends on."""
        live = torch.stack([(g != 0).any(3).any(0).any(0) for g in self.g]).any(0)
        (positions,) = live.nonzero(as_tuple=True)
        if not len(positions):  # an empty sum over positions is no kernel
            positions = positions.new_zeros(1)
        return Strand(self.use, [g[:, :, positions] for g in self.g], positions)


class Products:
    """Adds up J₁ J₂ᵀ over blocks of columns, with what `outputs` keeps of it.

    Args:
        outputs: Both output axes, their trace or their diagonal.
        symmetric: Whether both sides are the same; half of the products is then left
            out.
    """

    def __init__(self, outputs: Contracted, symmetric: bool) -> None:
        self.outputs = outputs
        self.symmetric = symmetric
        self._sum: Tensor | None = None

    def add(self, j1: Tensor, j2: Tensor | None) -> None:
        """Add the products of one block of columns, `(o, n, columns)`; None for j1."""
        o, n1, _ = j1.shape
        j2 = j1 if j2 is None else j2
        n2 = j2.shape[1]
        if self.outputs == "full":
            if self._sum is None:
                self._sum = j1.new_zeros(o * n1, o * n2)
            add_product(
                self._sum, j1.flatten(0, 1), j2.flatten(0, 1).mT, self.symmetric
            )
        else:
            if self._sum is None:
                self._sum = j1.new_zeros(o, n1, n2)
            self._sum.baddbmm_(j1, j2.mT)

    def kernel(self, o: int) -> Kernel:
        """`(n1, n2, o, o)`, `(n1, n2)` summed over outputs, or `(n1, n2, o)`."""
        assert self._sum is not None
        total = self._sum
        if self.outputs == "trace":
            return total.sum(0)
        if self.outputs == "diagonal":
            return total.permute(1, 2, 0)
        if self.symmetric:
            mirror_(total)
        n1, n2 = (size // o for size in total.shape)
        return total.view(o, n1, o, n2).permute(1, 3, 0, 2)


def add_product(total: Tensor, left: Tensor, right: Tensor, symmetric: bool) -> None:
    """`total += left @ right`; its upper triangle if that is enough."""
    count = 1
    if symmetric:
        count = 4 if len(left) >= 256 else 2 if len(left) >= 64 else 1
    size = -(-len(left) // count)
    for start in range(0, len(left), size):
        block = total[start : start + size, start if symmetric else 0 :]
        columns = right[:, start:] if symmetric else right
        block.addmm_(left[start : start + size], columns)


def materialized(
    left: list[Strand],
    right: list[Strand] | None,
    outputs: Contracted,
    workspace: int,
    root: Tensor | None = None,
) -> Kernel:
    """The kernel by the rows of J, some columns at a time.

    Args:
        left: All uses of the weight on the side of the rows.
        right: Those on the side of the columns; None for the same side.
        outputs: What is kept of the output axes.
        workspace: Numbers that may be allocated at a time.
        root: √Λ as `(q, c, d)`; None for 1.

    Returns:
        The kernel, summed over the outputs for `"trace"`.
    """
    d, unit = left[0].use.shape[3], left[0].use.unit
    o = len(left[0].g)
    sides = [left] if right is None else [left, right]
    height = sum(o * side[0].g[0][..., 0, :].numel() for side in sides)  # of J
    width = max(1, min(d, workspace // max(1, height)))
    width -= width % unit if width > unit else 0
    products = Products(outputs, right is None)
    for columns in _slices(d, width):
        j = [_columns_of_j(side, columns, workspace, root) for side in sides]
        products.add(j[0], j[1] if right else None)
    return products.kernel(o)


def _columns_of_j(
    side: list[Strand], columns: slice, workspace: int, root: Tensor | None
) -> Tensor:
    """`(o, n, q·columns·c)`, summed over the uses."""
    n, q, _, c = side[0].g[0].shape
    o, width = len(side[0].g), columns.stop - columns.start
    j = side[0].g[0].new_empty(o, n, q, width, c)
    chunk = max(1, workspace // max(1, sum(s.use.scratch for s in side) * width))
    for rows in _slices(n, chunk):
        a = _joined([strand.a(rows, columns) for strand in side]).flatten(0, 1).mT
        for k in range(o):
            g = _joined([strand.g[k][rows] for strand in side]).flatten(0, 1)
            torch.bmm(a, g, out=j[k, rows].view(-1, width, c))
    if root is not None:
        j *= root[..., columns].mT
    return j.flatten(2)


def paired(
    left: list[Strand],
    right: list[Strand] | None,
    outputs: Contracted,
    workspace: int,
    scale: float = 1.0,
    offset: float = 0.0,
    into: Kernel | None = None,
) -> Kernel:
    """The kernel by products of pairs of positions; for `"full"` there is one position.

    Args:
        left: All uses of the weight on the side of the rows.
        right: Those on the side of the columns; None for the same side.
        outputs: What is kept of the output axes.
        workspace: Numbers that may be allocated at a time.
        scale: Λ of the weight.
        offset: Λ of the bias that goes with it.
        into: A full kernel to add to: large ones are limited by memory, not operations.

    Returns:
        The kernel, summed over the outputs for `"trace"`; or `into`.
    """
    o = len(left[0].g)
    a1, a2 = _positions(left), _positions(right or left)
    if outputs == "full":
        weights = (a1[:, 0] @ a2[:, 0].mT).mul_(scale).add_(offset)
        g1 = _stacked(left)[:, :, 0].transpose(0, 1).flatten(0, 1)  # (n·o, c)
        g2 = (
            g1
            if right is None
            else _stacked(right)[:, :, 0].transpose(0, 1).flatten(0, 1)
        )
        total = weights.new_zeros(*weights.shape, o, o) if into is None else into
        # Block by block: reading a large Gram matrix again would take longer than it.
        size = max(1, _CACHED // (o * len(g2)))
        if right is None:  # what lies left of a block is left out
            size = min(size, -(-len(a1) // 4))
        for rows in _slices(len(a1), size):
            columns = slice(rows.start if right is None else 0, len(a2))
            own, others = g1[o * rows.start : o * rows.stop], g2[o * columns.start :]
            gram = (own @ others.mT).view(-1, o, len(others) // o, o)
            scale_of = weights[rows, columns, None, None]
            total[rows, columns].addcmul_(gram.transpose(1, 2), scale_of)
        return total
    g1, g2 = _stacked(left), _stacked(right or left)
    (n1, t, _), (n2, t2, _) = a1.shape, a2.shape
    kernel = a1.new_zeros(o if outputs == "diagonal" else 1, n1, n2)
    for rows in _slices(n1, max(1, workspace // (3 * t * t2 * n2))):
        columns = slice(rows.start if right is None else 0, n2)
        weights = a1[rows].flatten(0, 1) @ a2[columns].flatten(0, 1).mT
        weights.mul_(scale).add_(offset)
        sums = torch.zeros_like(weights)
        for k in range(o):
            if outputs == "diagonal":
                sums.zero_()
            sums.addmm_(g1[k, rows].flatten(0, 1), g2[k, columns].flatten(0, 1).mT)
            if outputs == "diagonal" or k == o - 1:
                block = (weights * sums).view(-1, t, columns.stop - columns.start, t2)
                kernel[k if outputs == "diagonal" else 0, rows, columns] = block.sum(
                    (1, 3)
                )
    return kernel.permute(1, 2, 0) if outputs == "diagonal" else kernel[0]


def factored(
    left: list[Strand],
    right: list[Strand] | None,
    workspace: int,
    scale: float = 1.0,
    offset: float = 0.0,
) -> Kernel:
    """The full kernel by a aᵀ applied to g, for each pair of examples.

    Args:
        left: All uses of the weight on the side of the rows.
        right: Those on the side of the columns; None for the same side.
        workspace: Numbers that may be allocated at a time.
        scale: Λ of the weight.
        offset: Λ of the bias that goes with it.

    Returns:
        `(n1, n2, o, o)`.
    """
    a1, a2 = _positions(left), _positions(right or left)
    (n1, t1, d), (n2, t2, _) = a1.shape, a2.shape
    g1 = _stacked(left, 1).flatten(2)  # (n1, o, t·c)
    g2 = _stacked(right or left, 3).flatten(2)  # (n2, t, c·o)
    o = g1.shape[1]
    kernel = a1.new_zeros(n1, n2, o, o)
    size = max(1, min(workspace, _CACHED) // (t1 * (t2 + g2.shape[2])))
    for m in range(n2):
        last = m + 1 if right is None else n1
        for rows in _slices(last, size):
            s = a1[rows].reshape(-1, d) @ a2[m].mT
            if (scale, offset) != (1.0, 0.0):
                s.mul_(scale).add_(offset)
            applied = (s @ g2[m]).view(rows.stop - rows.start, -1, o)
            kernel[rows, m] = g1[rows] @ applied
    return kernel


def _joined(uses: list[Tensor]) -> Tensor:
    """`(m, q, t, …)` of all uses: the steps of a recurrent layer are many of one."""
    return uses[0] if len(uses) == 1 else torch.cat(uses, 2)


def _positions(side: list[Strand]) -> Tensor:
    """The factors a of all uses, one after the other: `(n, t, d)`."""
    parts = [strand.a(slice(None)).squeeze(1) for strand in side]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).contiguous()


def _stacked(side: list[Strand], axis: int = 0) -> Tensor:
    """The gradients of all uses, `(n, t, c)` with the outputs put before an axis."""
    uses = [torch.stack([g.squeeze(1) for g in s.g], axis) for s in side]
    return uses[0] if len(uses) == 1 else torch.cat(uses, 1 if axis > 1 else 2)


def _slices(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))

"""The kernel of a table of which every position reads one row."""

import torch
from torch import Tensor

from ntk_callbacks._types import Kernel
from ntk_callbacks.engine.contraction import Contracted, Products
from ntk_callbacks.engine.factors import Lookup


def looked_up(
    left: list[tuple[Lookup, Tensor]],
    right: list[tuple[Lookup, Tensor]] | None,
    outputs: Contracted,
    workspace: int,
) -> Kernel:
    """The kernel of a table: rows of different ids are orthogonal.

    Ids that several examples share are treated as columns of J; those of one example
    add to its own block of the kernel only.

    Args:
        left: Uses of the table with their gradients `(o, n, t, c)`.
        right: Those on the side of the columns; None for the same side.
        outputs: What is kept of the output axes.
        workspace: Numbers that may be allocated at a time.

    Returns:
        The kernel, summed over the outputs for `"trace"`.
    """
    ids1, g1 = _read(left)
    ids2, g2 = _read(right) if right else (ids1, g1)
    o, (n1, _), n2, c = len(g1), ids1.shape, len(ids2), g1.shape[-1]
    if right is None:
        owned = torch.cat([torch.unique(row[row >= 0]) for row in ids1])
        found, count = torch.unique(owned, return_counts=True)
        shared = found[count > 1]
    else:
        shared = torch.unique(ids1[torch.isin(ids1, ids2)])
        shared = shared[shared >= 0]
    products = Products(outputs, right is None)
    products.add(g1.new_zeros(o, n1, 1), g1.new_zeros(o, n2, 1) if right else None)
    width = max(1, workspace // (o * (n1 + n2) * c))
    for block in shared.split(width) if len(shared) else ():
        j1 = _rows_of_ids(ids1, g1, block)
        products.add(j1, _rows_of_ids(ids2, g2, block) if right else None)
    kernel = products.kernel(o)
    if right is None:
        kernel = kernel.clone()
        alone = torch.where(torch.isin(ids1, shared), -1, ids1)
        first = (alone[:, :, None] == alone[:, None, :]).int().argmax(-1)
        first = torch.where(alone < 0, -1, first)  # a number for each id of an example
        rows = torch.stack([Lookup.summed(g, first, alone.shape[1]) for g in g1], 1)
        rows = rows.flatten(2)  # (n, o, t·c)
        diagonal = range(n1)
        if outputs == "full":
            kernel[diagonal, diagonal] += rows @ rows.mT
        else:
            squares = rows.square().sum(-1)
            kernel[diagonal, diagonal] += (
                squares if outputs == "diagonal" else squares.sum(1)
            )
    return kernel


def _read(side: list[tuple[Lookup, Tensor]]) -> tuple[Tensor, Tensor]:
    """All positions that read the table: `(n, t)` ids and `(o, n, t, c)`."""
    ids = torch.cat([use.ids for use, _ in side], 1)
    return ids, torch.cat([g for _, g in side], 2)


def _rows_of_ids(ids: Tensor, g: Tensor, block: Tensor) -> Tensor:
    """`(o, n, ids in the block · c)` of J; the block is sorted."""
    place = torch.searchsorted(block, ids.contiguous()).clamp(max=len(block) - 1)
    place = torch.where(block[place] == ids, place, -1)
    rows = [Lookup.summed(gradient, place, len(block)) for gradient in g]
    return torch.stack(rows).flatten(2)

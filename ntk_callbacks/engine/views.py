"""Which numbers of which parameters a tensor inside a network stands for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ntk_callbacks._types import Params
from ntk_callbacks.engine.backward import graph_nodes
from ntk_callbacks.engine.factors import unexpanded


@dataclass(frozen=True)
class View:
    """Which numbers of a parameter a tap sees, as strides into its memory.

    Args:
        offset: From the first number of the parameter.
        shape: Sizes.
        stride: Strides; never 0 where the size is above 1.
    """

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def of(self, flat: Tensor) -> Tensor:
        """This view into a tensor `(…, numbers of the parameter)`."""
        return flat.as_strided(
            (*flat.shape[:-1], *self.shape),
            (*flat.stride()[:-1], *self.stride),
            flat.storage_offset() + self.offset,
        )

    def places(self) -> Tensor:
        """Index of each number it sees."""
        extent = (
            1
            + self.offset
            + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        )
        return self.of(torch.arange(extent)).flatten()


def roots(source: Tensor, parameters: Params) -> list[str]:
    """The parameters that a tensor is, or is computed from."""
    names = {id(leaf): name for name, leaf in parameters.items()}
    if id(source) in names:
        return [names[id(source)]]
    found = (names.get(id(getattr(n, "variable", None))) for n in graph_nodes(source))
    return sorted({name for name in found if name is not None})


def view_of(source: Tensor, leaf: Tensor) -> View | None:
    """What `source` is as a view of a parameter; None if it is none."""
    seen = unexpanded(source)
    if (
        _overlaps(seen)  # rows have a number for every entry, as of a Toeplitz matrix
        or seen.dtype != leaf.dtype
        or seen.untyped_storage().data_ptr() != leaf.untyped_storage().data_ptr()
        or seen.is_neg() != leaf.is_neg()
    ):
        return None
    if leaf.is_meta and not (seen is leaf or seen._base is leaf):
        return None
    offset = seen.storage_offset() - leaf.storage_offset()
    return View(int(offset), tuple(seen.shape), tuple(seen.stride()))


def _overlaps(tensor: Tensor) -> bool:
    """Whether two entries may lie at the same place in memory."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def extent(leaf: Tensor) -> int:
    """Numbers of memory from the first to the last entry of a parameter."""
    if not leaf.numel():
        return 0
    steps = zip(leaf.shape, leaf.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps)

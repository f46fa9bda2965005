"""What a tap knows of the rows of J that belong to its parameters.

For one output k, a backward pass gives the gradient g by the output of the tap. Every
`Use` turns it into ∂f_k/∂(parameter) of each example; an `Outer` and a `Lookup` also
give the kernel without forming those rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ntk_callbacks.engine.batch_axis import BatchAxis
from ntk_callbacks.engine.taps import Tap


@dataclass(frozen=True)
class Call:
    """A tap whose batch axis is known.

    Args:
        tap: The call.
        axis: Batch axis of its output.
        n: Number of examples.
    """

    tap: Tap
    axis: BatchAxis
    n: int

    def first(self, tensor: Tensor) -> Tensor:
        """`(n, k, …)`: the examples first; see `BatchAxis.first`."""
        return self.axis.first(tensor, self.n)

    def is_parameter(self, tensor: object) -> bool:
        """Whether an argument is a parameter of the tap, or made of some."""
        return id(tensor) in self.tap.sources

    def expect(self, condition: bool, what: str) -> None:
        """Raise a LookupError, on which the rule is not used, unless it holds."""
        if not condition:
            raise LookupError(f"{getattr(self.tap.function, '__name__', '?')}: {what}")


@dataclass(frozen=True)
class Outer:
    """A weight whose gradient is a sum of outer products, Σ_t g[t] ⊗ a[t].

    Args:
        data: What it multiplies, `(n, …)`, the examples first.
        left: `data` of some examples and which of the d columns -> a `(m, q, t, …)`,
            q groups of positions t.
        right: The gradient by the output -> g `(n, q, t, c)`.
        matrix: The weight, or anything of its shape -> `(q, c, d)`.
        weight: `(…, q, c, d)` -> `(…, *shape of the weight)`, the inverse.
        shape: `(q, t, c, d)`.
        unit: Columns that are read together: blocks of them are cheap.
        scratch: Numbers that `left` allocates for a column of one example.
    """

    data: Tensor
    left: Callable[[Tensor, slice], Tensor]
    right: Callable[[Tensor], Tensor]
    matrix: Callable[[Tensor], Tensor]
    weight: Callable[[Tensor], Tensor]
    shape: tuple[int, int, int, int]
    unit: int = 1
    scratch: int = 0

    def a(self, examples: slice, columns: slice = slice(None)) -> Tensor:
        """`(m, q, t, …)` of some examples and columns."""
        start, stop, _ = columns.indices(self.shape[3])
        return self.left(self.data[examples], slice(start, stop))

    def rows(self, gradient: Tensor) -> Tensor:
        """∂f_k/∂W of each example, `(n, *shape of the weight)`."""
        return self.weight(self.right(gradient).mT @ self.a(slice(None)))


@dataclass(frozen=True)
class Direct:
    """A parameter whose gradient is cheap to form for each example.

    Args:
        rows: The gradient by the output -> ∂f_k/∂p, `(n, *shape of p)`.
        size: Entries of p.
        output: Entries of the output for one example, about the multiply-adds of
            `rows`.
        bias: Whether the rows are those of an `Outer` of the same tap with a = 1.
        derived: Whether `rows` takes derivatives, which are wrong for some functions
            if those of several outputs are taken at once.
    """

    rows: Callable[[Tensor], Tensor]
    size: int
    output: int
    bias: bool = False
    derived: bool = False


@dataclass(frozen=True)
class Lookup:
    """A table of which each position of the input takes one row.

    Args:
        ids: Which row, `(n, t)`; -1 where the row has no gradient.
        right: The gradient by the output -> `(n, t, c)`.
        table: Shape of the table, `(v, c)`.
    """

    ids: Tensor
    right: Callable[[Tensor], Tensor]
    table: tuple[int, int]

    def rows(self, gradient: Tensor) -> Tensor:
        """∂f_k/∂table of each example, `(n, v, c)`."""
        g = self.right(gradient)
        return self.summed(g, self.ids, self.table[0])

    @staticmethod
    def summed(values: Tensor, ids: Tensor, size: int) -> Tensor:
        """Sum of `values` `(n, t, c)` over the positions of each id, `(n, size, c)`."""
        n, t, c = values.shape
        out = values.new_zeros(n, size + 1, c)
        place = torch.where(ids < 0, size, ids)  # the last row is thrown away
        out.scatter_add_(1, place[:, :, None].expand(n, t, c), values)
        return out[:, :size]


Use: TypeAlias = Outer | Direct | Lookup


def unexpanded(tensor: Tensor) -> Tensor:
    """A view without the repetitions of `expand`: one entry where the stride is 0."""
    for axis, (size, stride) in enumerate(
        zip(tensor.shape, tensor.stride(), strict=True)
    ):
        if size > 1 and stride == 0:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor

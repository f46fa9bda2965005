"""∂(end)/∂(start) between two places inside a network, from one forward pass.

A place is a tensor, or several that count as one (the h and c of an LSTM), flattened to
numbers of one example. Derivatives are total: they go along every path through `start`,
and past it nothing is held that autograd would move.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from ntk_callbacks.errors import UnsupportedModelError
from ntk_callbacks.layout import widened

Product: TypeAlias = Callable[[Tensor], Tensor]
"""(m, d) -> (m, c): one vector for each example, multiplied by its matrix."""

AUDITED = 1e-3
"""Float32 sums are off by 1e-5 or so, a wrong derivative by order one."""


@dataclass(frozen=True)
class Place:
    """Tensors inside a network, by the edges of the graph that lead to them.

    Args:
        edges: A `GradientEdge` each; None for a tensor without a graph, whose
            derivatives are not known.
        shapes: Of the tensors.
        axes: Which axis of each holds the examples; None if all belong to the only one.
        n: Number of examples.
        like: An empty tensor of the dtype and device.
    """

    edges: tuple[Any, ...]
    shapes: tuple[torch.Size, ...]
    axes: tuple[int | None, ...]
    n: int
    like: Tensor

    @classmethod
    def of(cls, tensors: list[Tensor], axes: list[int | None], n: int) -> "Place":
        """The place of the given tensors as they are now: later changes do not count.

        Args:
            tensors: At least one.
            axes: Of each tensor.
            n: Number of examples.

        Returns:
            Their place.
        """
        return cls(
            tuple(get_gradient_edge(t) if t.requires_grad else None for t in tensors),
            tuple(tensor.shape for tensor in tensors),
            tuple(axes),
            n,
            tensors[0].detach().new_empty(0),
        )

    @classmethod
    def joined(cls, places: "Sequence[Place]") -> "Place":
        """Several places of one forward pass as one, the numbers of the first first.

        Args:
            places: Of one dtype.

        Returns:
            The place of all their tensors.
        """
        return cls(
            tuple(edge for place in places for edge in place.edges),
            tuple(shape for place in places for shape in place.shapes),
            tuple(axis for place in places for axis in place.axes),
            places[0].n,
            places[0].like,
        )

    @property
    def size(self) -> int:
        """Numbers of one example."""
        return sum(shape.numel() for shape in self.shapes) // self.n

    @property
    def is_known(self) -> bool:
        """Whether autograd knows of all its tensors."""
        return all(edge is not None for edge in self.edges)

    def gathered(self, tensors: list[Tensor | None]) -> Float[Tensor, "n d"]:
        """Tensors of the shapes of the place as one row for each example."""
        rows = [
            self.like.new_zeros(self.n, shape.numel() // self.n)
            if tensor is None
            else tensor.movedim(axis or 0, 0).reshape(self.n, -1)
            for tensor, shape, axis in zip(tensors, self.shapes, self.axes, strict=True)
        ]
        return torch.cat(rows, 1)

    def spread(self, rows: Float[Tensor, "n d"]) -> list[Tensor]:
        """The inverse of `gathered`."""
        sizes = [shape.numel() // self.n for shape in self.shapes]
        parts = torch.split(rows, sizes, 1)
        tensors = []
        for part, shape, axis in zip(parts, self.shapes, self.axes, strict=True):
            if axis is None:
                tensors.append(part.reshape(shape))
                continue
            moved = [*shape[axis : axis + 1], *shape[:axis], *shape[axis + 1 :]]
            tensors.append(part.reshape(moved).movedim(0, axis))
        return tensors


class Segment:
    """Products with ∂(end)/∂(start) of each example, without forming it.

    Args:
        start: Where the derivative is taken by.
        end: What is differentiated.
        examples: How many examples have a Jacobian: the first ones.
        joint: Whether examples depend on one another; then the block of an example with
            itself is meant, at a backward pass for each.
    """

    def __init__(self, start: Place, end: Place, examples: int, joint: bool) -> None:
        self.start, self.end = start, end
        self.examples, self.joint = examples, joint
        self._linear: tuple[list[Tensor], list[Tensor]] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(c, d): numbers of one example at the end and at the start."""
        return self.end.size, self.start.size

    def transposed(self, u: Float[Tensor, "m c"]) -> Float[Tensor, "m d"]:
        """Jᵀu of each example, by one backward pass through the segment."""
        (rows,) = pulled_back([self.start], self.end, u, self.joint)
        return rows

    def times(self, v: Float[Tensor, "m d"]) -> Float[Tensor, "m c"]:
        """J v of each example: the derivative of vᵀJᵀw by w, from a graph of Jᵀw."""
        with torch.enable_grad():
            if self._linear is None:
                self._linear = self._transposed_graph()
                self._audit()
            weights, linear = self._linear

            def push(v: Float[Tensor, "n d"]) -> Float[Tensor, "n c"]:
                tensors = self.start.spread(v)
                known = [
                    (g, t)
                    for g, t in zip(linear, tensors, strict=True)
                    if g.requires_grad
                ]
                if not known:
                    return self.end.gathered([None] * len(weights))
                found = torch.autograd.grad(
                    [g for g, _ in known],
                    weights,
                    [t for _, t in known],
                    retain_graph=True,
                    allow_unused=True,
                )
                return self.end.gathered(list(found))

            return _each(push, v, self.start.n, self.joint)

    def _transposed_graph(self) -> tuple[list[Tensor], list[Tensor]]:
        ones = self.end.like.new_ones(self.end.n, self.end.size)
        weights = [w.clone().requires_grad_() for w in self.end.spread(ones)]
        rows = torch.autograd.grad(
            self.end.edges,
            self.start.edges,
            weights,
            create_graph=True,
            allow_unused=True,
        )
        linear = [
            self.start.like.new_zeros(shape) if row is None else row
            for row, shape in zip(rows, self.start.shapes, strict=True)
        ]
        return weights, linear

    def _audit(self) -> None:
        """Raise unless uᵀ(J v) = (Jᵀu)ᵀv: some backward passes have no derivative."""
        generator = torch.Generator().manual_seed(0)
        u, v = (
            torch.randn(self.examples, size, generator=generator).to(self.end.like)
            for size in self.shape
        )
        pushed, pulled = self.times(v), self.transposed(u)
        left = widened(u * pushed).sum(1)
        right = widened(pulled * v).sum(1)
        scale = widened(pushed).norm(dim=1) * widened(u).norm(dim=1)
        if ((left - right).abs() > AUDITED * scale).any():
            raise UnsupportedModelError(
                "J·v by differentiating the backward pass disagrees with Jᵀ·u: a "
                "function of this model has a backward pass that cannot be "
                "differentiated (a custom autograd.Function that detaches?). Choose "
                "narrower layers, whose Jacobians are formed."
            )


def pulled_back(
    starts: list[Place], end: Place, u: Float[Tensor, "m c"], joint: bool
) -> list[Float[Tensor, "m _"]]:
    """uᵀ ∂(end)/∂(start) for several starts, by one backward pass for all of them.

    Args:
        starts: Where derivatives are taken by.
        end: What is differentiated.
        u: One vector for each of the first examples.
        joint: As in `Segment`.

    Returns:
        For each start one row for each example; NaN where there is no graph.
    """
    flat = [(i, k) for i, start in enumerate(starts) for k in range(len(start.edges))]
    known = [(i, k) for i, k in flat if starts[i].is_known and end.is_known]

    def pull(u: Float[Tensor, "n c"]) -> Tensor:
        found: dict[tuple[int, int], Tensor | None] = {}
        if known:
            rows = torch.autograd.grad(
                end.edges,
                [starts[i].edges[k] for i, k in known],
                end.spread(u),
                retain_graph=True,
                allow_unused=True,
            )
            found = dict(zip(known, rows, strict=True))
        gathered = [
            start.gathered([found.get((i, k)) for k in range(len(start.edges))])
            for i, start in enumerate(starts)
        ]
        return torch.cat(gathered, 1)

    rows = _each(pull, u, end.n, joint)
    split = torch.split(rows, [start.size for start in starts], 1)
    return [
        part if start.is_known and end.is_known else torch.full_like(part, torch.nan)
        for part, start in zip(split, starts, strict=True)
    ]


def _each(product: Any, rows: Tensor, n: int, joint: bool) -> Tensor:
    """A product of all examples at once, or of one after the other if they mix."""
    if not joint:
        result: Tensor = product(rows)
        return result
    found = []
    for i, row in enumerate(rows):
        alone = rows.new_zeros(n, rows.shape[1])
        alone[i] = row
        found.append(product(alone)[i])
    return torch.stack(found)

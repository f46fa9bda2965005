"""A model around its present parameters: Jᵀu and J·v of a whole batch, in chunks.

Vectors are rows here, so that one of them is contiguous: `(k, m)` on the side of the
outputs, `(k, p)` on the side of the parameters.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_callbacks._types import Inputs, Params
from ntk_callbacks.engine.backward import gradients_of, leaf_parameters
from ntk_callbacks.engine.pushforward import (
    WAYS,
    ForwardModeWatch,
    Way,
    forward_mode,
)
from ntk_callbacks.errors import MemoryBudgetError, UnsupportedModelError
from ntk_callbacks.functional import ModelFunction
from ntk_callbacks.nested import examples

_log = logging.getLogger(__name__)

_GRAPHS = 3  # double backward holds the forward graph, its backward and the way back


def split(row: Float[Tensor, " p"], shapes: dict[str, torch.Size]) -> Params:
    """A vector of parameters as {name: view of it in the given shape}."""
    pieces = torch.split(row, [shape.numel() for shape in shapes.values()])
    return {
        name: piece.view(shape)
        for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
    }


def examples_that_fit(n: int, joint: bool, activations: int, budget: int) -> int:
    """How many examples are differentiated at a time.

    Args:
        n: Examples of the batch.
        joint: Whether they have to be run together.
        activations: Bytes that the graph of one example holds.
        budget: Bytes.

    Returns:
        n if `joint`, else at least 1.

    Raises:
        MemoryBudgetError: If the joint batch, or one example, does not fit.
    """
    example = max(_GRAPHS * activations, 1)
    least = n if joint else 1
    if least * example > budget:
        what = "the joint batch" if joint else "one example"
        raise MemoryBudgetError(
            f"TangentOperator: {what} needs at least {2 * least * example / 2**20:.3g} "
            f"MiB of working memory, the budget is {2 * budget / 2**20:.3g} MiB. Raise "
            f"`memory_budget`{' or pass fewer examples' if joint else ''}."
        )
    return n if joint else min(n, budget // example)


@dataclass(frozen=True)
class Linearization:
    """f(θ + v) ≈ f(θ) + J·v on one batch.

    Args:
        function: f(params, x) -> (n, c), differentiated in `function.params`.
        x: The batch.
        n: Its examples.
        c: Outputs of one example.
        chunk: Examples that are run together.
        joint: Whether they have to be; then `chunk` is n.
    """

    function: ModelFunction
    x: Inputs
    n: int
    c: int
    chunk: int
    joint: bool

    @cached_property
    def _leaf(self) -> Params:
        return leaf_parameters(self.function)

    @cached_property
    def _wanted(self) -> list[Tensor]:
        return [self._leaf[name] for name in self.function.params]

    def _chunks(self, size: int) -> Iterator[tuple[slice, Inputs]]:
        """Rows of J, and the examples they belong to."""
        for start in range(0, self.n, size):
            stop = min(start + size, self.n)
            rows = slice(start * self.c, stop * self.c)
            yield rows, examples(self.x, start, stop)

    def split(self, row: Float[Tensor, " p"]) -> Params:
        """A vector of parameters as {name: view of it in the parameter's shape}."""
        return split(row, {n: t.shape for n, t in self.function.params.items()})

    def pull(self, u: Float[Tensor, "k m"]) -> Float[Tensor, "k p"]:
        """Jᵀu of each row: one forward pass, and a backward pass for each."""
        p = sum(tensor.numel() for tensor in self.function.params.values())
        total = u.new_zeros(len(u), p)

        def add(outputs: Float[Tensor, "m c"], weights: Float[Tensor, "k mc"]) -> None:
            gradient = gradients_of(outputs)
            for row, weight in zip(total, weights, strict=True):
                number = (outputs * weight.view_as(outputs).to(outputs)).sum()
                parts = self.split(row).values()
                for part, term in zip(
                    parts, gradient(number, self._wanted), strict=True
                ):
                    part += term.to(part)

        for rows, part in self._chunks(self.chunk):
            add_here = partial(add, weights=u[:, rows])
            self.function.during(self._leaf, part, add_here)
        return total

    def push(self, v: Float[Tensor, "k p"], way: Way) -> Float[Tensor, "k m"]:
        """J·v of each row."""
        tangents = [
            {
                name: part.to(self.function.params[name])
                for name, part in self.split(row).items()
            }
            for row in v
        ]
        pushed = v.new_zeros(len(v), self.n * self.c)
        for rows, part in self._chunks(self.chunk):
            for row, change in zip(
                pushed, way(self.function, part, tangents), strict=True
            ):
                row[rows] = change.reshape(-1).to(row)
        return pushed

    def squared_rows(self, scale: Float[Tensor, " p"] | None) -> Float[Tensor, " m"]:
        """‖√Λ J_i‖² of every row of J, one backward pass each."""
        scales = None if scale is None else self.split(scale).values()

        def squares(outputs: Float[Tensor, "m c"]) -> Float[Tensor, " mc"]:
            gradient = gradients_of(outputs)
            norms = []
            for number in outputs.reshape(-1):
                squared = [row.square() for row in gradient(number, self._wanted)]
                if scales is not None:
                    pairs = zip(squared, scales, strict=True)
                    squared = [row * factor.to(row) for row, factor in pairs]
                # One sum for each parameter: more accurate than one over all.
                sums = [part.sum().to(outputs) for part in squared]
                norms.append(torch.stack(sums).sum())
            return torch.stack(norms)

        # Independent examples are run alone, so that a row costs the backward pass of
        # one example.
        size = self.n if self.joint else 1
        return torch.cat(
            [
                self.function.during(self._leaf, part, squares)
                for _, part in self._chunks(size)
            ]
        )

    def agreeing_way(self) -> tuple[Way, bool]:
        """The first way of computing J·v that fits the backward pass of this model.

        Returns:
            The way, and whether ⟨u, J v⟩ = ⟨Jᵀu, v⟩ could be seen: not where the
            weights or outputs are not finite.

        Raises:
            UnsupportedModelError: If no way goes, or those that go are wrong.
            OutOfMemoryError: If a product does not fit on the device.
        """
        generator = torch.Generator().manual_seed(0)
        like = next(iter(self.function.params.values()))
        signs = torch.randint(2, (1, self.n * self.c), generator=generator) * 2 - 1
        u = signs.to(like.device, self.function.dtype)
        gradient = self.pull(u)
        v = self._test_vector(gradient, generator)
        terms = self.split((gradient * v)[0]).values()
        expected = math.fsum(float(term.sum()) for term in terms)
        # Round-off adds up over the parameters, each of which has a share near 1.
        epsilon = torch.finfo(v.dtype).eps
        tolerance = 4 * (epsilon * len(self.function.params)) ** 0.5
        reasons: list[str] = []
        for name, way in WAYS.items():
            try:
                with ForwardModeWatch() if way is forward_mode else nullcontext():
                    found = float((u * self.push(v, way)).sum())
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # torch raises many types
                reason = (str(error).strip().splitlines() or [repr(error)])[0]
            else:
                if not math.isfinite(expected):
                    return way, False
                if abs(found - expected) <= tolerance:
                    _log.info("J·v by %s%s", name, "".join(reasons))
                    return way, True
                reason = f"<u, J v> is {found:.6g} where <Jᵀu, v> is {expected:.6g}"
            reasons.append(f"; not by {name} ({reason})")
        raise UnsupportedModelError(
            f"J·v cannot be computed on this model{''.join(reasons)}. Activation "
            "checkpoints need use_reentrant=False, custom autograd functions a "
            "differentiable `backward` or a `jvp`; Jᵀ·u, the diagonal and the trace of "
            "Θ need neither, and `empirical_ntk` gives all of Θ."
        )

    def _test_vector(
        self, gradient: Float[Tensor, "1 p"], generator: torch.Generator
    ) -> Float[Tensor, "1 p"]:
        """A v such that every parameter has a share near 1 in ⟨Jᵀu, v⟩."""
        # So that none can be missing without being missed. Gradients far below the
        # largest may be round-off and get less. The noise is for what Jᵀu is blind to.
        v = torch.empty_like(gradient)
        parts = list(self.split(gradient[0]).values())
        largest = max(float(part.norm()) for part in parts) or 1.0
        for part, target in zip(parts, self.split(v[0]).values(), strict=True):
            share = max(float(part.norm()), largest / 100)
            noise = torch.randn(part.shape, generator=generator).to(part)
            noise *= share / (2 * max(part.numel(), 1) ** 0.5)
            target.copy_((part + noise) / share / share)
        return v

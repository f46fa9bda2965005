"""Carries out a plan: backward passes to the taps, then a contraction for each term."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from ntk_callbacks._types import Kernel
from ntk_callbacks.engine.contraction import (
    Contracted,
    Products,
    Strand,
    factored,
    materialized,
    paired,
)
from ntk_callbacks.engine.exact import fallback
from ntk_callbacks.engine.lookup import looked_up
from ntk_callbacks.engine.plan import Plan
from ntk_callbacks.engine.problem import Problem
from ntk_callbacks.engine.sides import ChangedModelError, Side
from ntk_callbacks.engine.terms import Term
from ntk_callbacks.engine.views import extent, view_of
from ntk_callbacks.layout import symmetric_
from ntk_callbacks.nested import examples

Scale: TypeAlias = Callable[[str], Tensor | None]
"""Parameter -> its Λ, 0-dimensional or of its shape; None for 1."""


def run(
    plan: Plan,
    problem: Problem,
    seen: Callable[[Term, list[Side]], None] | None = None,
) -> dict[str, Kernel]:
    """The parts of a kernel by a plan.

    Args:
        plan: Made for this model; the examples may be others.
        problem: What to compute.
        seen: Told of each term with what it was contracted from, for each block.

    Returns:
        One kernel for each part, exactly symmetric if `x2` is None.

    Raises:
        ChangedModelError: If the model has other taps than the plan.
    """
    parts: dict[str, Kernel] = {}
    if plan.exact:
        own = problem.only(list(plan.exact))
        own = replace(own, budget=plan.budget, joint=plan.coupled)
        parts = fallback(own)
    params = problem.function.params | problem.function.fixed
    for rows, columns, block in _blocks(plan, problem):
        sides = [
            Side(problem.function, params, x, plan.places, list(plan.sizes_of))
            for x in block.sides
        ]
        if any(side.o != plan.sizes.o for side in sides):
            raise ChangedModelError("the number of outputs differs from the plan's")
        for sweep in plan.sweeps:
            for side in sides:
                side.differentiate(sweep, plan.at_once)
            for term in sweep:
                part = problem.groups[term.name]
                if part not in parts:
                    parts[part] = _zeros(problem, plan.sizes.o)
                _add(term, sides, plan, block, parts[part][rows, columns])
                if seen is not None:
                    seen(term, sides)
                for side in sides:
                    side.forget(term)
    for part in problem.groups.values():  # of parameters that nothing uses
        if part not in parts:
            parts[part] = _zeros(problem, plan.sizes.o)
    ordered = {part: parts[part] for part in dict.fromkeys(problem.groups.values())}
    if problem.x2 is None:
        return {part: symmetric_(kernel) for part, kernel in ordered.items()}
    return ordered


def _zeros(problem: Problem, o: int) -> Kernel:
    like = next(iter(problem.function.params.values()))
    n1, n2 = problem.sizes
    if problem.outputs == "full":  # as a matrix in memory, which products add to
        return like.new_zeros(n1, o, n2, o).transpose(1, 2)
    return like.new_zeros(n1, n2, *([o] if problem.outputs == "diagonal" else []))


@torch.no_grad()
def _add(
    term: Term, sides: list[Side], plan: Plan, problem: Problem, total: Kernel
) -> None:
    """Add the kernel of a term to its part."""
    outputs, scale, workspace = problem.outputs, problem.scale, plan.workspace
    if term.route == "paired" and outputs == "full":
        contracted_term(term, sides, outputs, scale, workspace, into=total)
        return
    kernel = contracted_term(term, sides, outputs, scale, workspace)
    alpha = 1 / sides[0].o if outputs == "trace" else 1.0
    total.add_(kernel.to(total.device), alpha=alpha)


def _blocks(plan: Plan, problem: Problem) -> Iterator[tuple[slice, slice, Problem]]:
    """The upper blocks of the kernel that are computed at a time."""
    if not plan.terms:
        return
    n1, n2 = problem.sizes
    if plan.block >= max(n1, n2):
        yield slice(0, n1), slice(0, n2), problem
        return
    for i in range(0, n1, plan.block):
        rows = slice(i, min(i + plan.block, n1))
        x1 = examples(problem.x1, rows.start, rows.stop)
        if problem.x2 is None:
            yield rows, rows, replace(problem, x1=x1)
        others = problem.x1 if problem.x2 is None else problem.x2
        for j in range(0 if problem.x2 is not None else rows.stop, n2, plan.block):
            columns = slice(j, min(j + plan.block, n2))
            x2 = examples(others, columns.start, columns.stop)
            yield rows, columns, replace(problem, x1=x1, x2=x2)


def contracted_term(
    term: Term,
    sides: Sequence[Side],
    outputs: Contracted,
    scale: Scale,
    workspace: int,
    into: Kernel | None = None,
) -> Kernel:
    """The kernel of one term, summed over the outputs for `"trace"`.

    Args:
        term: What to contract.
        sides: One, or two for a cross kernel; already differentiated.
        outputs: What is kept of the output axes.
        scale: Λ of each parameter.
        workspace: Numbers that may be allocated at a time.
        into: For a full kernel on the paired route, what it is added to.

    Returns:
        `(n1, n2, o, o)`, `(n1, n2)` or `(n1, n2, o)`; or `into`.
    """
    own = scale(term.name)
    scalar = 1.0 if own is None else _number(own) if own.ndim == 0 else None
    if term.route in ("paired", "factored"):
        assert scalar is not None
        bias = None if term.bias is None else scale(term.bias)
        offset = 0.0 if term.bias is None else 1.0 if bias is None else _number(bias)
        strands = [side.strands(term) for side in sides]
        right = strands[1] if len(sides) > 1 else None
        if term.route == "paired" and not (outputs == "full" and _several(strands)):
            return paired(strands[0], right, outputs, workspace, scalar, offset, into)
        kernel = factored(strands[0], right, workspace, scalar, offset)
        return kernel if into is None else into.add_(kernel)
    root = None if scalar is not None or own is None else _root(term, sides[0], own)
    if term.route == "materialized":
        strands = [side.strands(term) for side in sides]
        right = strands[1] if len(sides) > 1 else None
        matrix = None if root is None else strands[0][0].use.matrix(root)
        kernel = materialized(strands[0], right, outputs, workspace, matrix)
    elif term.route == "lookup":
        tables = [side.lookups(term) for side in sides]
        found = tables[1] if len(sides) > 1 else None
        kernel = looked_up(tables[0], found, outputs, workspace)
    else:
        j = [side.rows(term) for side in sides]
        if root is not None:
            j = [rows * root.flatten() for rows in j]
        products = Products(outputs, len(sides) == 1)
        products.add(j[0], j[1] if len(sides) > 1 else None)
        kernel = products.kernel(sides[0].o)
    return kernel if scalar in (None, 1.0) else kernel * scalar


def _several(sides: list[list[Strand]]) -> bool:
    """Whether there is more than one position, though the plan saw only one live."""
    return any(sum(strand.g[0].shape[2] for strand in side) > 1 for side in sides)


def _number(scale: Tensor) -> float:
    return 1.0 if scale.is_meta else float(scale)


def _root(term: Term, side: Side, scale: Tensor) -> Tensor:
    """√Λ in the layout of the rows of a term."""
    leaf = side.recording.parameters[term.name]
    whole = view_of(leaf, leaf)
    assert whole is not None
    flat = leaf.new_zeros(extent(leaf))
    whole.of(flat).copy_(scale.sqrt())
    view = term.members[0].view
    several = term.route == "rows" and len(term.members) > 1
    return flat if several or view is None else view.of(flat)

"""The exact routes: per-example Jacobians, contracted parameter by parameter.

`"vmap"` differentiates many examples at once with `torch.func`; `"rows"` takes one row
of the Jacobian at a time with plain autograd, slower and always right. Both hand blocks
of J to the same contraction, which adds up one Gram matrix per parameter: one float32
sum over all parameters together would be ten times less accurate.
"""

import logging
import warnings
from collections.abc import Callable
from functools import partial
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jacrev, vmap

from ntk_callbacks._types import Inputs, Kernel, Params
from ntk_callbacks.engine.backward import (
    gradients_of,
    graph_size,
    leaf_parameters,
)
from ntk_callbacks.engine.coupling import is_coupled, refuse_randomness
from ntk_callbacks.engine.memory import passes
from ntk_callbacks.engine.problem import Problem
from ntk_callbacks.errors import MemoryBudgetError, UnsupportedModelError
from ntk_callbacks.layout import symmetric
from ntk_callbacks.nested import batch_size, examples, leaves, replace_leaves

_log = logging.getLogger(__name__)

Keep: TypeAlias = Callable[[slice, Params], None]
"""Takes the examples of a chunk and its Jacobian, {name: (m, c, *shape)}."""

Jacobian: TypeAlias = Callable[[Problem, Inputs, list[str], int, bool, Keep], None]
"""`(problem, x, names, chunk, joint, keep)`: gives `keep` J by the named parameters."""


def contracted(problem: Problem, jacobian: Jacobian) -> dict[str, Kernel]:
    """The parts of the kernel, from blocks of columns of the Jacobian.

    Args:
        problem: What to compute.
        jacobian: The route that gives J.

    Returns:
        One kernel for each part, exactly symmetric if `x2` is None.
    """
    function = problem.function
    coupled = [problem.joint or is_coupled(function, x) for x in problem.sides]
    n = [batch_size(x) for x in problem.sides]
    c, activations = graph_size(function, problem.x1)
    plan = passes(
        {name: function.params[name].numel() for name in problem.groups},
        sum(n) * c,
        c,
        function.dtype.itemsize,
        activations=activations,
        budget=problem.budget,
    )
    shape = {"full": (c, c), "trace": (), "diagonal": (c,)}[problem.outputs]
    size = (n[0], n[-1], *shape)
    like = next(iter(function.params.values()))
    parts = {part: like.new_zeros(size) for part in problem.groups.values()}
    for columns in plan.columns:
        sides = [
            _held(problem, jacobian, x, columns, plan.chunk, joint)
            for x, joint in zip(problem.sides, coupled, strict=True)
        ]
        for name in columns:
            product = gram(sides[0][name], sides[-1][name], problem.outputs)
            parts[problem.groups[name]] += product
    if problem.x2 is None:
        return {part: symmetric(kernel) for part, kernel in parts.items()}
    return parts


def _held(
    problem: Problem,
    jacobian: Jacobian,
    x: Inputs,
    columns: dict[str, slice],
    chunk: int,
    joint: bool,
) -> Params:
    """Columns of J for all examples, `(n, c, columns)` for each parameter, times √Λ."""
    params = problem.function.params
    n = batch_size(x)
    held: Params = {}

    def keep(rows: slice, part: Params) -> None:
        for name, kept in columns.items():
            whole = part.pop(name).detach()
            whole = whole.reshape(*whole.shape[:2], -1)
            block = whole[:, :, kept]
            if len(block) == n and block.shape == whole.shape:  # nothing to gather
                held[name] = block
                continue
            if name not in held:
                held[name] = block.new_empty(n, *block.shape[1:])
            held[name][rows] = block

    jacobian(problem, x, list(columns), chunk, joint, keep)
    if problem.scaling is not None:
        for name, kept in columns.items():
            scale = problem.scale(name)
            assert scale is not None
            root = scale.sqrt().expand(params[name].shape).reshape(-1)
            held[name] = held[name] * root[kept]
    return held


def gram(
    j1: Float[Tensor, "n1 c p"],
    j2: Float[Tensor, "n2 c p"],
    outputs: Literal["full", "trace", "diagonal"],
) -> Kernel:
    """J₁ J₂ᵀ with its output axes kept, traced (1/c) or restricted to the diagonal."""
    (n1, c, _), n2 = j1.shape, j2.shape[0]
    if outputs == "full":
        product = j1.flatten(0, 1) @ j2.flatten(0, 1).mT
        return product.view(n1, c, n2, c).transpose(1, 2)
    if outputs == "trace":
        return j1.flatten(1) @ j2.flatten(1).mT / c
    return (j1.transpose(0, 1) @ j2.permute(1, 2, 0)).permute(1, 2, 0)


def vmapped_jacobian(
    problem: Problem, x: Inputs, names: list[str], chunk: int, joint: bool, keep: Keep
) -> None:
    """J of many examples at once: `vmap` over examples of `jacrev` over outputs."""
    if joint:
        raise UnsupportedModelError(
            'route="vmap" differentiates each example on its own, but here the output '
            "of one example depends on the others (for example BatchNorm on batch "
            'statistics). Use route="rows" or route="auto".'
        )
    function = problem.function
    selected = {name: function.params[name] for name in names}

    def single(params: Params, tensors: list[Tensor]) -> Tensor:
        example = replace_leaves(x, [tensor.unsqueeze(0) for tensor in tensors])
        return function(params, example).squeeze(0)

    differentiate = vmap(jacrev(single), in_dims=(None, 0))
    n = batch_size(x)
    for start in range(0, n, chunk):
        rows = slice(start, min(start + chunk, n))
        part = leaves(examples(x, rows.start, rows.stop))
        with warnings.catch_warnings():
            # An operator without a batching rule is slower; nobody can change that.
            warnings.filterwarnings("ignore", "There is a performance drop")
            chunk_jacobian = differentiate(selected, part)
        keep(rows, chunk_jacobian)


def row_jacobian(
    problem: Problem, x: Inputs, names: list[str], chunk: int, joint: bool, keep: Keep
) -> None:
    """J row by row: one backward pass for each output of each example."""
    function = problem.function
    leaf = leaf_parameters(function)
    wanted = [leaf[name] for name in names]

    def differentiate(outputs: Float[Tensor, "m c"], start: int) -> None:
        row = gradients_of(outputs)
        for i, example in enumerate(outputs, start):
            rows = [row(output, wanted) for output in example]
            stacked = [torch.stack(parts)[None] for parts in zip(*rows, strict=True)]
            keep(slice(i, i + 1), dict(zip(names, stacked, strict=True)))

    # Independent examples are run alone, so that a row costs the backward pass of one
    # example; coupled ones share one graph of the whole batch.
    n = batch_size(x)
    for start in [0] if joint else range(n):
        part = x if joint else examples(x, start, start + 1)
        function.during(leaf, part, partial(differentiate, start=start))


def checked_vmap(problem: Problem) -> dict[str, Kernel]:
    """The kernel by `"vmap"`, whose entries of two examples are those of `"rows"`.

    Some operators have rules in `torch.func` that give other numbers (PReLU where there
    are as many examples as outputs, `cdist`).

    Args:
        problem: What to compute.

    Returns:
        One kernel for each part.

    Raises:
        UnsupportedModelError: If the numbers differ.
    """
    parts = contracted(problem, vmapped_jacobian)
    ends = [0, -1]
    pair = problem.at(ends)
    rounding = 100 * torch.finfo(problem.function.dtype).eps ** 0.5
    for part, expected in contracted(pair, row_jacobian).items():
        found = parts[part][ends][:, ends]
        size = expected.abs().max()
        gap = (found - expected).abs().max()
        if not expected.is_meta and gap > rounding * size:
            raise UnsupportedModelError(
                "torch.func gives other derivatives than autograd for this model: the "
                f"kernel of two examples differs by {float(gap / size):.1e} of its "
                'largest entry. Use route="rows" or route="auto".'
            )
    return parts


def fallback(problem: Problem) -> dict[str, Kernel]:
    """The first exact route that works on this model."""
    try:
        return checked_vmap(problem)
    except (MemoryBudgetError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch.func raises many types
        reason = (str(error).strip().splitlines() or [""])[0]
        _log.info("route 'vmap' cannot go here (%s); using 'rows'", reason)
    return ROUTES["rows"](problem)


Route: TypeAlias = Callable[[Problem], dict[str, Kernel]]

ROUTES: dict[str, Route] = {
    "vmap": checked_vmap,
    "rows": partial(contracted, jacobian=row_jacobian),
}
"""Name -> how a kernel is computed. All give the same numbers."""


def by_route(route: str, problem: Problem) -> dict[str, Kernel]:
    """The parts of a kernel by an exact route.

    Args:
        route: A key of `ROUTES`.
        problem: What to compute.

    Returns:
        One kernel for each part.

    Raises:
        UnsupportedModelError: If the route cannot go here, or the model draws random
            numbers.
    """
    if problem.joint:  # else chance is found where neighbors are looked for
        for x in problem.sides:
            refuse_randomness(problem.function, x)
    return ROUTES[route](problem)

"""How the kernel moves along a step of the weights, without finite differences."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ntk_callbacks._types import (
    Inputs,
    Kernel,
    Mode,
    OutputFunction,
    ParameterFilter,
    Params,
    Scaling,
)
from ntk_callbacks.engine.arguments import Request, check_choice
from ntk_callbacks.engine.backward import graph_size, leaf_parameters
from ntk_callbacks.engine.coupling import is_coupled
from ntk_callbacks.engine.exact import gram
from ntk_callbacks.engine.memory import passes
from ntk_callbacks.engine.problem import Problem
from ntk_callbacks.errors import UnsupportedModelError
from ntk_callbacks.guard import measuring
from ntk_callbacks.layout import symmetric
from ntk_callbacks.nested import batch_size, examples

Contraction: TypeAlias = Literal["full", "trace", "diagonal"]
"""How the output axes of a kernel are contracted; `"pseudo"` is another kernel."""


def kernel_change(
    model: nn.Module,
    step: Mapping[str, Tensor],
    x1: Inputs,
    x2: Inputs | None = None,
    *,
    outputs: Contraction = "full",
    parameters: ParameterFilter = None,
    scaling: Scaling | None = None,
    output_fn: OutputFunction | None = None,
    mode: Mode = "eval",
    memory_budget: int | str | None = None,
) -> Kernel:
    """First-order change of the kernel along a step, d/dε Θ(θ + ε Δθ) at ε = 0.

    J̇ Λ Jᵀ + J Λ J̇ᵀ with the derivative J̇ of the Jacobian along Δθ, one product with a
    Hessian for each output. Along the step that an optimizer is about to take
    (`predicted_step`) this is how far the kernel moves in it. Zero for models that are
    linear in θ; in wide networks of order depth/width of the kernel.

    Costs n·c backward passes and as many backward passes through those.

    Args:
        model: Any module; left exactly as it was.
        step: Δθ, name of a trained parameter -> tensor of its shape; the others stay.
            Any direction will do, the change is linear in it.
        x1: n1 inputs, as in `empirical_ntk`.
        x2: n2 inputs of the other side; None for those of `x1`.
        outputs: `"full"`, `"trace"` (the mean over outputs) or `"diagonal"`.
        parameters: Which parameters the kernel is of, as in `empirical_ntk`; all of
            the step moves in any case.
        scaling: Λ, as there; held fixed.
        output_fn: `(model, x) -> (n, ...)`; default `model(x)`.
        mode: `"eval"` or `"train"`, as there.
        memory_budget: Working memory beside the result, as there.

    Returns:
        A change of the shape and dtype that `empirical_ntk` gives; symmetric without
        `x2`, of either sign.

    Raises:
        ValueError: If an argument is not understood, or the step names a parameter that
            the model does not train or that has another shape.
        UnsupportedModelError: If the model is random or cannot be differentiated twice.
        MemoryBudgetError: If not even one example fits into the budget.

    Example:
        f = θ² x has Θ = 4 θ² x x' and dΘ/dθ = 8 θ x x':

        >>> class Square(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.theta = nn.Parameter(torch.tensor([3.0]))
        ...
        ...     def forward(self, x):
        ...         return self.theta**2 * x
        >>> step = {"theta": torch.tensor([0.5])}
        >>> kernel_change(Square(), step, torch.tensor([[1.0], [2.0]]), outputs="trace")
        tensor([[12., 24.],
                [24., 48.]])

    References:
        Huang, Yau 2019, arXiv:1909.08156 (the hierarchy of kernels); Roberts, Yaida,
        Hanin 2021, arXiv:2106.10165 (the differential of the NTK).
    """
    check_choice("outputs", outputs, get_args(Contraction))
    _check_step(model, step)
    request = Request(
        outputs, None, parameters, scaling, output_fn, mode, memory_budget
    )
    with measuring(model, mode), sdpa_kernel(SDPBackend.MATH):
        problem = request.problem(model, x1, x2)
        coupled = [
            is_coupled(problem.function, x, joint=problem.joint) for x in problem.sides
        ]
        with _twice(model):
            return _contracted(problem, dict(step), coupled)


@contextmanager
def _twice(model: nn.Module) -> Iterator[None]:
    """Says of what torch raises that a second derivative was asked for."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError | UnsupportedModelError):
            raise
        raise UnsupportedModelError(
            f"kernel_change: {type(model).__name__} cannot be differentiated twice "
            f"({error}). Activation checkpoints need use_reentrant=False, custom "
            "autograd functions a differentiable `backward`."
        ) from error


def _contracted(problem: Problem, step: Params, coupled: list[bool]) -> Kernel:
    function, sizes = problem.function, problem.sizes
    c, activations = graph_size(function, problem.x1)
    numbers = {name: tensor.numel() for name, tensor in function.params.items()}
    plan = passes(
        numbers,
        2 * sum(sizes[: len(coupled)]) * c,  # of J and of its derivative
        2 * c,
        function.dtype.itemsize,
        activations=3 * activations,  # the graph, its backward pass and the way back
        budget=problem.budget,
    )
    shape = {"full": (c, c), "trace": (), "diagonal": (c,)}[problem.outputs]
    like = next(iter(function.params.values()))
    change = like.new_zeros(*sizes, *shape)
    for columns in plan.columns:
        sides = [
            _jacobian_and_change(problem, step, x, columns, joint)
            for x, joint in zip(problem.sides, coupled, strict=True)
        ]
        for name in columns:
            (j1, change1), (j2, change2) = sides[0][name], sides[-1][name]
            scale = problem.scale(name)
            if scale is not None:
                flat = scale.expand(function.params[name].shape).reshape(-1)
                scaled = flat[columns[name]]
                j1, change1 = j1 * scaled, change1 * scaled
            change += gram(j1, change2, problem.outputs)
            change += gram(change1, j2, problem.outputs)
    return change if problem.x2 is not None else symmetric(change)


def _jacobian_and_change(
    problem: Problem, step: Params, x: Inputs, columns: dict[str, slice], joint: bool
) -> dict[str, tuple[Float[Tensor, "n c p"], Float[Tensor, "n c p"]]]:
    """Columns of J and J̇ of all examples for each parameter."""
    function = problem.function
    leaf = leaf_parameters(function)
    names = list({**columns, **step})
    wanted = [leaf[name] for name in names]
    changes = [step[name].to(leaf[name]) if name in step else None for name in names]
    kept: dict[str, tuple[list[Tensor], list[Tensor]]] = {n: ([], []) for n in columns}

    def differentiate(outputs: Float[Tensor, "m c"]) -> None:
        for number in outputs.reshape(-1):
            row = _rows(number, wanted, create_graph=True)
            terms = [
                (part * change).sum()
                for part, change in zip(row, changes, strict=True)
                if change is not None
            ]
            along = _rows(torch.stack(terms).sum(), wanted)
            for name, part, moved in zip(names, row, along, strict=True):
                if name in kept:
                    # Copies, because a view of some columns would hold all of them.
                    cut = columns[name]
                    kept[name][0].append(part.detach().flatten()[cut].clone())
                    kept[name][1].append(moved.detach().flatten()[cut].clone())

    n = batch_size(x)
    parts = [x] if joint else [examples(x, i, i + 1) for i in range(n)]
    for part in parts:
        function.during(leaf, part, differentiate)

    def whole(rows: list[Tensor]) -> Float[Tensor, "n c p"]:
        return torch.stack(rows).view(n, -1, rows[0].numel())

    return {name: (whole(rows), whole(moved)) for name, (rows, moved) in kept.items()}


def _rows(
    number: Tensor, wanted: list[Tensor], create_graph: bool = False
) -> list[Tensor]:
    if not number.requires_grad:
        return [torch.zeros_like(tensor) for tensor in wanted]
    found = torch.autograd.grad(
        number,
        wanted,
        retain_graph=True,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return [gradient.to_dense() for gradient in found]


def _check_step(model: nn.Module, step: Mapping[str, Tensor]) -> None:
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not step:
        raise ValueError(
            "kernel_change: the step is empty; expected a tensor for each parameter "
            f"that moves, under names such as {list(trained)[:8]}."
        )
    for name, change in step.items():
        if name not in trained:
            raise ValueError(
                f"kernel_change: step[{name!r}] is no parameter that this "
                f"{type(model).__name__} trains; expected names such as "
                f"{list(trained)[:8]}."
            )
        if change.shape != trained[name].shape:
            raise ValueError(
                f"kernel_change: step[{name!r}] has shape {tuple(change.shape)}; "
                f"expected {tuple(trained[name].shape)}."
            )

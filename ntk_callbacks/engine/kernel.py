"""The empirical neural tangent kernel of any module."""

import logging
from collections.abc import Mapping
from typing import Literal, overload

import torch
from torch import nn

from ntk_callbacks._types import (
    Grouping,
    Inputs,
    Kernel,
    Mode,
    OutputFunction,
    Outputs,
    ParameterFilter,
    Scaling,
)
from ntk_callbacks.engine.arguments import Request, check_choice
from ntk_callbacks.engine.exact import ROUTES, by_route, fallback
from ntk_callbacks.engine.execution import run
from ntk_callbacks.engine.plan import Plan
from ntk_callbacks.engine.planner import planned_for
from ntk_callbacks.engine.problem import Problem
from ntk_callbacks.engine.sides import ChangedModelError
from ntk_callbacks.errors import MemoryBudgetError, UnsupportedModelError
from ntk_callbacks.guard import measuring

_log = logging.getLogger(__name__)


@overload
def empirical_ntk(
    model: nn.Module,
    x1: Inputs,
    x2: Inputs | None = None,
    *,
    outputs: Outputs = ...,
    by: None = None,
    parameters: ParameterFilter = ...,
    scaling: Scaling | None = ...,
    output_fn: OutputFunction | None = ...,
    mode: Mode = ...,
    route: str | Plan = ...,
    memory_budget: int | str | None = ...,
) -> Kernel: ...


@overload
def empirical_ntk(
    model: nn.Module,
    x1: Inputs,
    x2: Inputs | None = None,
    *,
    outputs: Outputs = ...,
    by: Literal["module", "parameter"] | Mapping[str, str],
    parameters: ParameterFilter = ...,
    scaling: Scaling | None = ...,
    output_fn: OutputFunction | None = ...,
    mode: Mode = ...,
    route: str | Plan = ...,
    memory_budget: int | str | None = ...,
) -> dict[str, Kernel]: ...


def empirical_ntk(
    model: nn.Module,
    x1: Inputs,
    x2: Inputs | None = None,
    *,
    outputs: Outputs = "full",
    by: Grouping = None,
    parameters: ParameterFilter = None,
    scaling: Scaling | None = None,
    output_fn: OutputFunction | None = None,
    mode: Mode = "eval",
    route: str | Plan = "auto",
    memory_budget: int | str | None = None,
) -> Kernel | dict[str, Kernel]:
    """Empirical neural tangent kernel Θ = J Λ Jᵀ with J = ∂f/∂θ.

    `Θ[i, j, k, l] = Σ_p Λ_p ∂f_k(x1_i)/∂θ_p · ∂f_l(x2_j)/∂θ_p`, Λ = 1 by default. The
    model is left exactly as it was (see `quietly`).

    Args:
        model: Any module. Parameters shared by several modules count once.
        x1: n1 inputs: a tensor, or a nested tuple (positional arguments) or mapping
            (keyword arguments) of tensors with the examples first.
        x2: n2 inputs of the other side; None for the kernel of `x1` with itself.
        outputs: `"full"` keeps both output axes; `"trace"` is (1/c) Σₖ Θ[:, :, k, k];
            `"diagonal"` is Θ[:, :, k, k]; `"pseudo"` is the kernel of Σₖ fₖ/√c, an
            approximation of the traced kernel at 1/c of its cost.
        by: None, or how to split the kernel into parts that add up to it: `"module"`,
            `"parameter"`, or `{name: regular expression}` (the first that matches a
            parameter takes it; what none matches goes to `"rest"`).
        parameters: None for those with `requires_grad`; a regular expression among
            those; or a predicate `(name, parameter)`.
        scaling: None, or for every measured parameter the diagonal of Λ ≥ 0: a number
            or a tensor of the parameter's shape.
        output_fn: `(model, x) -> (n, ...)`; default `model(x)`. Trailing axes are
            flattened into c.
        mode: `"eval"`, or `"train"`: the kernel of the joint batch through BatchNorm's
            batch statistics, whose running values do not move. Dropout is off in both.
        route: `"auto"` plans, proves the plan on two examples and carries it out; a
            `Plan` from `plan_ntk` is carried out as it is; `"vmap"` and `"rows"`
            differentiate every example and output.
        memory_budget: Working memory beside the result, in bytes or as `"2GiB"`;
            default a quarter of what the device has free.

    Returns:
        Kernel of shape `(n1, n2, c, c)`, `(n1, n2)`, `(n1, n2, c)` or `(n1, n2)` for
        the four `outputs`, or a dict of such kernels if `by` is given. In the dtype
        (float32 for half-precision models) and on the device of the parameters;
        symmetric to the last bit and positive semi-definite to round-off without `x2`.

    Raises:
        ValueError: If an argument is not understood or nothing is selected.
        UnsupportedModelError: If the kernel would be wrong or undefined: random or
            complex outputs, lazy or sharded parameters.
        MemoryBudgetError: If not even one example fits into the budget.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        >>> empirical_ntk(nn.Linear(2, 1, bias=False), x, outputs="trace")
        tensor([[5., 2.],
                [2., 1.]])

    References:
        Jacot, Gabriel, Hongler 2018, arXiv:1806.07572. Costs of the routes: Novak,
        Sohl-Dickstein, Schoenholz 2022, arXiv:2206.08720.
    """
    request = Request(outputs, by, parameters, scaling, output_fn, mode, memory_budget)
    if not isinstance(route, Plan):
        check_choice("route", route, ("auto", *ROUTES))
    with measuring(model, mode):
        problem = request.problem(model, x1, x2)
        if isinstance(route, Plan):
            parts, _ = measured(problem, route.checked(problem))
        elif route == "auto":
            parts, _ = measured(problem, planned_for(problem))
        else:
            parts = by_route(route, problem)
    return parts if by is not None else parts[""]


def plan_ntk(
    model: nn.Module,
    x1: Inputs,
    x2: Inputs | None = None,
    *,
    outputs: Outputs = "full",
    by: Grouping = None,
    parameters: ParameterFilter = None,
    scaling: Scaling | None = None,
    output_fn: OutputFunction | None = None,
    mode: Mode = "eval",
    memory_budget: int | str | None = None,
) -> Plan:
    """How `empirical_ntk` would compute a kernel, and what that takes.

    One forward pass of two examples shows where each parameter meets the data. For each
    the operations and bytes of every way to contract it are counted, the cheapest is
    taken, and the kernel it gives on two examples is held against plain autograd: a
    parameter for which they differ takes an exact route, as does one that no rule
    covers. `print` shows the plan as a table; `empirical_ntk(…, route=plan)` carries it
    out again and again, while the model trains, without planning anew.

    Args:
        model: As in `empirical_ntk`, which has the same arguments.
        x1: Inputs of the rows.
        x2: Inputs of the columns.
        outputs: As in `empirical_ntk`.
        by: As in `empirical_ntk`.
        parameters: As in `empirical_ntk`.
        scaling: As in `empirical_ntk`; its numbers may differ later, its shapes not.
        output_fn: As in `empirical_ntk`.
        mode: As in `empirical_ntk`.
        memory_budget: As in `empirical_ntk`.

    Returns:
        A plan for kernels of this model, of these shapes and arguments.

    Raises:
        ValueError: If an argument is not understood or nothing is selected.
        UnsupportedModelError: If the kernel would be wrong or undefined.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> x = torch.randn(5, 3)
        >>> plan = plan_ntk(model, x)
        >>> plan.coverage
        1.0
        >>> empirical_ntk(model, x, route=plan).shape
        torch.Size([5, 5, 2, 2])

    References:
        Novak, Sohl-Dickstein, Schoenholz 2022, arXiv:2206.08720 (structured
        derivatives); Rochette et al. 2019, arXiv:1912.06015 (per-example gradients).
    """
    request = Request(outputs, by, parameters, scaling, output_fn, mode, memory_budget)
    with measuring(model, mode):
        return planned_for(request.problem(model, x1, x2))


def measured(problem: Problem, plan: Plan) -> tuple[dict[str, Kernel], Plan]:
    """Carry out a plan, and if it cannot be carried out, another one.

    Args:
        problem: The kernel.
        plan: A plan for it.

    Returns:
        The parts of the kernel, and the plan that gave them.

    Raises:
        MemoryBudgetError: If not even one example fits into the budget.
        UnsupportedModelError: If the kernel would be wrong or undefined.
    """
    planned_anew = False
    while True:
        try:
            return run(plan, problem), plan
        except (MemoryBudgetError, UnsupportedModelError):
            raise
        except ChangedModelError as change:
            if planned_anew:
                plan = plan.all_exact(f"it does something else each time ({change})")
            else:
                plan, planned_anew = planned_for(problem), True
            _log.info("%s: planned anew, because %s", plan.model, change)
        except Exception as error:
            if not _out_of_memory(error):
                _log.warning("%s: no fast route (%r)", plan.model, error)
                return fallback(problem), plan.all_exact(str(error))
            if plan.budget < _SMALLEST_BUDGET:
                raise
            plan = plan.within(plan.budget // 2)
            _log.warning("%s: out of memory; half the budget is tried", plan.model)


_SMALLEST_BUDGET = 2**20


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return "can't allocate memory" in text or "not enough memory" in text

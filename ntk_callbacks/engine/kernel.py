"""The empirical neural tangent kernel of any module."""

import logging
import re
from collections.abc import Mapping
from typing import get_args

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
from ntk_callbacks.engine.coupling import refuse_randomness
from ntk_callbacks.engine.exact import ROUTES, Problem
from ntk_callbacks.engine.memory import memory_bytes
from ntk_callbacks.errors import MemoryBudgetError
from ntk_callbacks.functional import ModelFunction, check_output_fn, compiled
from ntk_callbacks.guard import measuring
from ntk_callbacks.nested import batch_size

_log = logging.getLogger(__name__)


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
    route: str = "auto",
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
        route: `"auto"`, or a key of the routes (`"vmap"`, `"rows"`).
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
    _check_choice("outputs", outputs, get_args(Outputs))
    _check_choice("mode", mode, get_args(Mode))
    _check_choice("route", route, ("auto", *ROUTES))
    check_selection(parameters, by, output_fn)
    if not (scaling is None or isinstance(scaling, Mapping)):
        raise ValueError(
            f"scaling is a {type(scaling).__name__}; expected a mapping of parameter "
            "names to numbers or tensors of the parameter's shape."
        )
    with measuring(model, mode):
        function = ModelFunction(
            model,
            output_fn=output_fn,
            parameters=parameters,
            pseudo=outputs == "pseudo",
        )
        names = list(function.params)
        problem = Problem(
            function=function,
            x1=function.prepare(x1),
            x2=None if x2 is None else function.prepare(x2),
            outputs="trace" if outputs == "pseudo" else outputs,
            groups=parameter_groups(names, by),
            scaling=_checked_scaling(scaling, function),
            budget=memory_bytes(memory_budget, function.device),
            joint=mode == "train",
        )
        for x in problem.sides:
            if batch_size(x) == 0:
                raise ValueError("empirical_ntk: the inputs hold no example.")
            refuse_randomness(function, x)
        parts = _automatic(problem) if route == "auto" else ROUTES[route](problem)
    return parts if by is not None else parts[""]


def _automatic(problem: Problem) -> dict[str, Kernel]:
    """The first route that works on this model."""
    *fast, last = ROUTES
    for name in fast:
        try:
            return ROUTES[name](problem)
        except (MemoryBudgetError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # torch.func raises many types
            reason = (str(error).strip().splitlines() or [""])[0]
            _log.info("route %r cannot go here (%s); using %r", name, reason, last)
    return ROUTES[last](problem)


def check_selection(
    parameters: object = None, by: object = None, output_fn: object = None
) -> None:
    """Refuse what `empirical_ntk` would refuse for any model.

    Args:
        parameters: What is to be passed as its `parameters`.
        by: What is to be passed as its `by`.
        output_fn: What is to be passed as its `output_fn`.

    Raises:
        ValueError: If one of them is of the wrong kind, or a pattern is no regular
            expression.
    """
    if not (parameters is None or callable(parameters)):
        compiled("parameters", parameters)
    _patterns(by)
    check_output_fn(output_fn)


def _patterns(by: object) -> dict[str, re.Pattern[str]]:
    """Part of the kernel -> what its parameters match; empty if `by` is no mapping."""
    if isinstance(by, Mapping):
        return {k: compiled(f"by[{k!r}]", p) for k, p in by.items()}
    if not (by is None or (isinstance(by, str) and by in {"module", "parameter"})):
        raise ValueError(
            f"by={by!r}; expected None, 'module', 'parameter' or {{name: regex}}."
        )
    return {}


def parameter_groups(names: list[str], by: Grouping) -> dict[str, str]:
    """Parameter name -> name of the part of the kernel it adds to.

    Args:
        names: Parameters of the kernel.
        by: As in `empirical_ntk`.

    Returns:
        An entry for every name; all map to `""` if `by` is None.

    Raises:
        ValueError: If `by` is not understood, or one of its patterns matches nothing.
    """
    patterns = _patterns(by)
    if by is None:
        return dict.fromkeys(names, "")
    if by == "parameter":
        return {name: name for name in names}
    if by == "module":
        return {name: name.rpartition(".")[0] for name in names}
    groups = {
        name: next((part for part, p in patterns.items() if p.search(name)), "rest")
        for name in names
    }
    for part in patterns.keys() - set(groups.values()):
        raise ValueError(
            f"by: the pattern {patterns[part].pattern!r} of {part!r} takes no "
            f"parameter; the names are {', '.join(names)}."
        )
    return groups


def _checked_scaling(
    scaling: Scaling | None, function: ModelFunction
) -> Scaling | None:
    if scaling is None:
        return None
    missing = [name for name in function.params if name not in scaling]
    unknown = [name for name in scaling if name not in function.params]
    if missing or unknown:
        raise ValueError(
            "scaling needs one entry for each measured parameter; missing: "
            f"{missing or 'none'}, not measured: {unknown or 'none'}."
        )
    for name, value in scaling.items():
        try:
            scale = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"scaling[{name!r}] is {value!r}; expected a number or a tensor."
            ) from error
        shape = function.params[name].shape
        if scale.ndim and scale.shape != shape:
            raise ValueError(
                f"scaling[{name!r}] has shape {tuple(scale.shape)}; expected a number "
                f"or the parameter's shape {tuple(shape)}."
            )
        if not scale.is_meta and not (scale.isfinite() & (scale >= 0)).all():
            raise ValueError(f"scaling[{name!r}] must be finite and not negative.")
    return scaling


def _check_choice(argument: str, value: object, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ValueError(f"{argument}={value!r}; expected one of {', '.join(valid)}.")

"""What the arguments of `empirical_ntk` mean: a request, and the problem it poses."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import nn

from ntk_callbacks._types import (
    Grouping,
    Inputs,
    Mode,
    Outputs,
    Scaling,
)
from ntk_callbacks.engine.memory import memory_bytes
from ntk_callbacks.engine.problem import Problem
from ntk_callbacks.functional import ModelFunction, check_output_fn, compiled
from ntk_callbacks.nested import batch_size


@dataclass(frozen=True)
class Request:
    """What is asked of a kernel, whatever the model; see `empirical_ntk`.

    Raises:
        ValueError: If an argument is not understood.
    """

    # Any: these are what a user passed, of whatever type, until they are checked.
    outputs: Any = "full"
    by: Any = None
    parameters: Any = None
    scaling: Any = None
    output_fn: Any = None
    mode: Any = "eval"
    memory_budget: Any = None

    def __post_init__(self) -> None:
        check_choice("outputs", self.outputs, get_args(Outputs))
        check_choice("mode", self.mode, get_args(Mode))
        check_selection(self.parameters, self.by, self.output_fn)
        if not (self.scaling is None or isinstance(self.scaling, Mapping)):
            raise ValueError(
                f"scaling is a {type(self.scaling).__name__}; expected a mapping of "
                "parameter names to numbers or tensors of the parameter's shape."
            )

    def problem(self, model: nn.Module, x1: Inputs, x2: Inputs | None) -> Problem:
        """The kernel to compute.

        Args:
            model: In the state it is measured in.
            x1: Inputs of the rows.
            x2: Inputs of the columns, or None.

        Returns:
            The problem, with inputs on the device of the parameters.

        Raises:
            ValueError: If nothing is selected or measured, or Λ does not fit.
        """
        function = ModelFunction(
            model,
            output_fn=self.output_fn,
            parameters=self.parameters,
            pseudo=self.outputs == "pseudo",
        )
        problem = Problem(
            function=function,
            x1=function.prepare(x1),
            x2=None if x2 is None else function.prepare(x2),
            outputs="trace" if self.outputs == "pseudo" else self.outputs,
            groups=parameter_groups(list(function.params), self.by),
            scaling=_checked_scaling(self.scaling, function),
            budget=memory_bytes(self.memory_budget, function.device),
            joint=self.mode == "train",
        )
        if any(batch_size(x) == 0 for x in problem.sides):
            raise ValueError("empirical_ntk: the inputs hold no example.")
        return problem


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


def check_choice(argument: str, value: object, valid: tuple[Any, ...]) -> None:
    """Raise a ValueError unless the value is a valid one."""
    if value not in valid:
        raise ValueError(f"{argument}={value!r}; expected one of {', '.join(valid)}.")

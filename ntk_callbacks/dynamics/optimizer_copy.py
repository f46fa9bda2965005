"""A copy of an optimizer that steps beside it, and what it takes from the original."""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ntk_callbacks.guard import isolated_rng
from ntk_callbacks.nested import parts


def optimizer_copy(optimizer: Optimizer, memo: dict[int, Any]) -> Optimizer:
    """An optimizer of the same class, hyper-parameters and state, without hooks.

    Args:
        optimizer: Any; left as it is.
        memo: That of `copy.deepcopy`: `{id(parameter): other}` makes the copy train the
            other parameter; all that is not in it is copied, and entered here.

    Returns:
        The copy.

    Raises:
        ValueError: If it cannot be copied.
    """
    try:
        return _copied(optimizer, memo)
    except Exception as error:
        raise ValueError(
            f"{type(optimizer).__name__} cannot be copied: {error}"
        ) from error


def _copied(optimizer: Optimizer, memo: dict[int, Any]) -> Optimizer:
    if hasattr(optimizer, "__deepcopy__"):  # it knows best
        return copy.deepcopy(optimizer, memo)
    # Else not so: optimizers pickle their groups and state alone, though others keep
    # more than that, and unpickling one wraps the `step` of its class for good, which
    # breaks wrappers that never called `Optimizer.__init__`.
    twin: Optimizer = object.__new__(type(optimizer))
    memo[id(optimizer)] = twin
    for held in parts(list(vars(optimizer).values())):
        if isinstance(held, Optimizer) and id(held) not in memo:
            _copied(held, memo)  # what Lookahead, SAM and the like step
    for key, value in vars(optimizer).items():
        if key.endswith("_hooks"):
            vars(twin)[key] = type(value)()
        elif key != "step":  # a scheduler's, that steps the original
            vars(twin)[key] = copy.deepcopy(value, memo)
    return twin


def take_step(twin: Optimizer, devices: set[torch.device]) -> None:
    """One step from the class, not the instance: schedulers and hooks sit around it.

    Args:
        twin: A copy of an optimizer.
        devices: Those whose random generators it might use.
    """
    step = type(twin).step
    if getattr(step, "hooked", False):
        step = getattr(step, "__wrapped__", step)
    with isolated_rng(devices):
        step(twin)


def follow_groups(
    twin: Optimizer, optimizer: Optimizer, others: dict[int, torch.nn.Parameter]
) -> None:
    """Give a copy the hyper-parameters that the original has now, group by group.

    So that schedules of rates and the like, which change the original alone, hold for
    both; groups that the original was given since are added.

    Args:
        twin: A copy of the optimizer; keeps its own state.
        optimizer: The original.
        others: `id` of a parameter of the original -> the one in its place.
    """
    known = len(twin.param_groups)
    for group in optimizer.param_groups[known:]:
        parameters = [others.get(id(p), p) for p in group["params"]]
        twin.add_param_group({**group, "params": parameters})
    for group, own in zip(optimizer.param_groups, twin.param_groups, strict=True):
        for key, value in group.items():
            if key not in ("params", "param_names"):
                own[key] = _held(value)


def refuse_closures(optimizer: Optimizer) -> None:
    """Raise a ValueError if the optimizer evaluates the loss while it steps."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{type(optimizer).__name__} evaluates the loss during its step, which a "
            "gradient alone cannot predict. Expected an optimizer that steps without a "
            "closure."
        )


def _held(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)

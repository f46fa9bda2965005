"""Which sharpness an optimizer can stand, and what it takes for the kernel."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from ntk_callbacks._types import ParameterFilter
from ntk_callbacks.dynamics.optimizer_scaling import SCALINGS, optimizer_scaling
from ntk_callbacks.dynamics.stability import learning_rate_limit
from ntk_callbacks.functional import select_parameters

# Classes around the optimizer of a user that step it and do no more.
_WRAPPERS = {"LightningOptimizer", "_FabricOptimizer", "AcceleratedOptimizer"}


@dataclass(frozen=True, slots=True)
class StabilityLimit:
    """Where the edge of stability lies for λ_max(J P⁻¹ Jᵀ), weighted by the curvature.

    Attributes:
        limit: Gradient descent on a quadratic loss diverges above it.
        scaling: P⁻¹ by parameter, η P⁻¹ the rates of the optimizer; None for the
            identity.
        seen: Whether P is known: adaptive optimizers have none before their first step,
            and none can be told from rates that are all 0.
    """

    limit: float
    scaling: dict[str, float | Tensor] | None = None
    seen: bool = True


def stability_limit(
    optimizers: Sequence[Optimizer], model: nn.Module, parameters: ParameterFilter
) -> StabilityLimit | None:
    """The edge of stability of optimizers at their learning rates now.

    2/η for gradient descent, 2(1 + β)/η with a heavy ball, 2(1 + β)/((1 + 2β) η) with
    Nesterov's momentum, (2 + 2β₁)/((1 − β₁) η) for Adam and AdamW, whose momentum is a
    mean. η is the largest of the rates of all groups, and P⁻¹ the rates relative to it;
    dampening makes η smaller. Weight decay is not counted.

    Args:
        optimizers: All that train the measured parameters.
        model: The module that is trained.
        parameters: Which are measured, as in `empirical_ntk`.

    Returns:
        None if no optimizer is known, one has no rule in `optimizer_scaling` or climbs
        instead of descending, or groups differ in their momentum.

    References:
        Cohen et al. 2021, arXiv:2103.00065; 2022, arXiv:2207.14484 (Adam).
    """
    names = select_parameters(model, parameters)
    measured = {id(model.get_parameter(name)) for name in names}
    used = [
        (optimizer, group, {id(p) for p in group["params"]} & measured)
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]
    used = [(optimizer, group, held) for optimizer, group, held in used if held]
    if not used or any(_unknown(optimizer, group) for optimizer, group, _ in used):
        return None
    limits = {_limit(optimizer, group) for optimizer, group, _ in used}
    units = {_unit(optimizer, group) for optimizer, group, _ in used}
    if len(limits) > 1:
        return None
    unit = max(units)
    limit = limits.pop() / unit if unit else float("inf")
    held = set().union(*(held for _, _, held in used))
    plain = all(type(optimizer) is SGD for optimizer, _, _ in used)
    if plain and len(units) == 1 and held == measured:
        return StabilityLimit(limit)
    if not unit:
        return StabilityLimit(limit, seen=False)
    scaling: dict[str, float | Tensor] = dict.fromkeys(names, 0.0)
    for optimizer in {id(optimizer): optimizer for optimizer, _, _ in used}.values():
        try:
            rates = optimizer_scaling(optimizer, model, parameters=parameters)
        except ValueError:  # adaptive, before its first step
            return StabilityLimit(limit, seen=False)
        for name, rate in rates.items():
            coming = rate * _decay(optimizer, model.get_parameter(name))
            scaling[name] = scaling[name] + coming / unit
    return StabilityLimit(limit, scaling)


def trains_just(
    optimizers: Sequence[Optimizer], model: nn.Module, parameters: ParameterFilter
) -> bool:
    """Whether these optimizers train all the measured parameters, and no others.

    Args:
        optimizers: All that train.
        model: The module that is trained.
        parameters: Which are measured, as in `empirical_ntk`.

    Returns:
        False where a layer that no optimizer holds is measured, or one that moves is
        not; frozen parameters that an optimizer holds do not count.
    """
    names = select_parameters(model, parameters)
    measured = {id(model.get_parameter(name)) for name in names}
    held = {
        id(p)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
        if p.requires_grad
    }
    return held == measured


def unwrapped(optimizers: Sequence[Optimizer]) -> list[Optimizer]:
    """The optimizers inside those of Lightning, Fabric and accelerate."""
    return [_unwrapped(optimizer) for optimizer in optimizers]


def _unwrapped(optimizer: Any) -> Optimizer:
    # Not those inside others, such as Lookahead, which do more than to step them.
    kinds = {kind.__name__ for kind in type(optimizer).__mro__}
    held: Optimizer = optimizer.optimizer if kinds & _WRAPPERS else optimizer
    return held


def _unknown(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether nothing is known of the optimizer's stability."""
    climbs = bool(group.get("maximize"))
    return type(optimizer) not in SCALINGS or climbs or _momentum(optimizer, group) >= 1


def _momentum(optimizer: Optimizer, group: dict[str, Any]) -> float:
    if type(optimizer) in (Adam, AdamW):
        return float(group["betas"][0])
    return float(group.get("momentum", 0.0))


def _unit(optimizer: Optimizer, group: dict[str, Any]) -> float:
    """What `optimizer_scaling` multiplies P⁻¹ with."""
    rate, beta = float(group["lr"]), _momentum(optimizer, group)
    if type(optimizer) is SGD:
        return rate * (1 - float(group["dampening"]) if beta else 1.0) / (1 - beta)
    return rate / (1 - beta) if type(optimizer) is RMSprop else rate


def _decay(optimizer: Optimizer, parameter: nn.Parameter) -> float:
    """Rate of the coming step over that of the last one, at the same `lr`."""
    state = optimizer.state.get(parameter, {})
    if type(optimizer) is not Adagrad or not state:
        return 1.0
    steps = float(state["step"])
    (decay,) = {
        float(group["lr_decay"])
        for group in optimizer.param_groups
        if any(held is parameter for held in group["params"])
    }
    return (1 + (steps - 1) * decay) / (1 + steps * decay)


def _limit(optimizer: Optimizer, group: dict[str, Any]) -> float:
    """Largest stable λ_max(J Λ Jᵀ) with Λ as in `optimizer_scaling`."""
    beta = _momentum(optimizer, group)
    nesterov = bool(group.get("nesterov", False))
    one = torch.ones((), dtype=torch.float64)
    limit = learning_rate_limit(one, momentum=beta, nesterov=nesterov)
    return float(limit) / (1 - beta)

"""An optimizer as a matrix of learning rates: Λ in the preconditioned kernel J Λ Jᵀ."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from ntk_callbacks._types import ParameterFilter
from ntk_callbacks.dynamics.optimizer_step import side_step
from ntk_callbacks.functional import select_parameters


def optimizer_scaling(
    optimizer: Optimizer,
    model: nn.Module,
    gradients: Mapping[str, Tensor] | None = None,
    *,
    parameters: ParameterFilter = None,
) -> dict[str, float | Tensor]:
    """How far a parameter moves for a gradient that stays: Δθ = −Λ ∂L/∂θ.

    Λ is diagonal: η for `SGD`, η (1 − dampening)/(1 − β) with momentum β, which adds up
    past gradients; η/(√v̂ + ε) for `Adam` and `AdamW` with v̂ corrected for its bias (its
    maximum with amsgrad); η/((√v + ε)(1 − β)) for `RMSprop`, less the squared mean in v
    if centered; η/(√Σg² + ε) for `Adagrad`, η decayed as in its last step. Given to
    `empirical_ntk` as `scaling=`, the preconditioned kernel J Λ Jᵀ says how the outputs
    move for each gradient by the outputs, and its λ_max how near the edge of stability
    the optimizer is. Momentum is counted as if the gradient had not changed for a
    while; what the next step does exactly is `predicted_step`. Weight decay is no part
    of Λ.

    Args:
        optimizer: One of those; of exactly that class.
        model: The module whose parameters it trains.
        gradients: Parameter name -> gradient: the second moments after the step that
            they would cause. By default those the optimizer has now.
        parameters: Which parameters, as in `empirical_ntk`.

    Returns:
        Parameter name -> number or tensor of the parameter's shape, ≥ 0; zero for
        parameters that the optimizer does not hold or has never moved.

    Raises:
        ValueError: If the optimizer is another one, adapts to gradients and has seen
            none, or climbs (`maximize=True`), where a kernel J Λ Jᵀ ≥ 0 would foretell
            the opposite.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.75)
        >>> optimizer_scaling(sgd, net)
        {'weight': 2.0}

    References:
        Kingma, Ba 2015, arXiv:1412.6980; Cohen et al. 2022, arXiv:2207.14484
        (preconditioned sharpness).
    """
    rule = SCALINGS.get(type(optimizer))
    if rule is None:
        known = ", ".join(kind.__name__ for kind in SCALINGS)
        raise ValueError(
            f"optimizer_scaling: no rule for {type(optimizer).__name__}, only for "
            f"{known}. Its next step is known all the same: `predicted_step`."
        )
    names = select_parameters(model, parameters)
    groups = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    named = {name: model.get_parameter(name) for name in names}
    _refuse_climbing(optimizer, named, groups)
    if gradients is None:
        states = {n: optimizer.state.get(p, {}) for n, p in named.items()}
    else:
        states = side_step(optimizer, model, gradients)[0]
    if type(optimizer) is not SGD and not any(map(_has_seen, states.values())):
        raise ValueError(
            f"optimizer_scaling: {type(optimizer).__name__} scales by the gradients it "
            "has seen, and has seen none yet. Take a step first, or pass the first "
            "`gradients`."
        )
    return {
        name: rule(groups[id(p)], states.get(name, {})) if id(p) in groups else 0.0
        for name, p in named.items()
    }


def _refuse_climbing(
    optimizer: Optimizer,
    named: Mapping[str, nn.Parameter],
    groups: Mapping[int, dict[str, Any]],
) -> None:
    for name, parameter in named.items():
        if groups.get(id(parameter), {}).get("maximize"):
            raise ValueError(
                f"optimizer_scaling: {type(optimizer).__name__} climbs, maximize=True "
                f"for {name!r}: a step is +Λ ∂L/∂θ, and no Λ ≥ 0 is its scaling. "
                "Minimize −L, or take its next step from `predicted_step`."
            )


def _sgd(group: dict[str, Any], _: dict[str, Any]) -> float:
    beta = float(group["momentum"])
    kept = 1 - float(group["dampening"]) if beta else 1.0
    return float(group["lr"]) * kept / (1 - beta)


def _adam(group: dict[str, Any], state: dict[str, Any]) -> float | Tensor:
    if not _has_seen(state):
        return 0.0
    second: Tensor = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    corrected = second / (1 - float(group["betas"][1]) ** float(state["step"]))
    scale: Tensor = float(group["lr"]) / (corrected.sqrt() + float(group["eps"]))
    return scale


def _rmsprop(group: dict[str, Any], state: dict[str, Any]) -> float | Tensor:
    if not _has_seen(state):
        return 0.0
    second: Tensor = state["square_avg"]
    if group["centered"]:
        second = (second - state["grad_avg"] ** 2).clamp(min=0)
    rate = float(group["lr"]) / (1 - float(group["momentum"]))
    scale: Tensor = rate / (second.sqrt() + float(group["eps"]))
    return scale


def _adagrad(group: dict[str, Any], state: dict[str, Any]) -> float | Tensor:
    if not _has_seen(state):
        return 0.0
    total: Tensor = state["sum"]
    rate = float(group["lr"]) / (1 + (float(state["step"]) - 1) * group["lr_decay"])
    scale: Tensor = rate / (total.sqrt() + float(group["eps"]))
    return scale


def _has_seen(state: dict[str, Any]) -> bool:
    """Whether a step was taken; Adagrad has a state before."""
    return bool(torch.as_tensor(state.get("step", 0)) > 0)


SCALINGS: dict[type[Optimizer], Callable[[Any, Any], float | Tensor]] = {
    SGD: _sgd,
    Adam: _adam,
    AdamW: _adam,
    RMSprop: _rmsprop,
    Adagrad: _adagrad,
}

"""The step an optimizer is about to take, found without taking it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ntk_callbacks._types import ParameterFilter, Params
from ntk_callbacks.dynamics.optimizer_copy import (
    optimizer_copy,
    refuse_closures,
    take_step,
)
from ntk_callbacks.functional import select_parameters


def predicted_step(
    optimizer: Optimizer,
    model: nn.Module,
    gradients: Mapping[str, Tensor] | None = None,
    *,
    parameters: ParameterFilter = None,
) -> Params:
    """Δθ of the optimizer's next step, to the last bit, without a trace on either.

    A copy of the optimizer, its state and its parameters takes the step on the side, so
    that every optimizer is right: momentum and dampening, bias correction, weight
    decay, rates by group, amsgrad, foreach and fused variants, and those of other
    packages. Hooks of the optimizer are not run. Costs one more copy of the parameters
    and of the optimizer's state while it runs.

    With J = ∂f/∂θ the outputs change by J Δθ to first order: give the result to
    `TangentOperator(model, x).jvp`.

    Args:
        optimizer: Any `torch.optim.Optimizer` that steps without a closure.
        model: The module whose parameters it trains.
        gradients: Parameter name -> gradient as the optimizer will see it (after
            `clipped_gradients`); by default what is in `.grad`. The optimizer skips
            parameters without one.
        parameters: Which changes to return, as in `empirical_ntk`.

    Returns:
        Parameter name -> Δθ in the dtype of the parameter; zero where nothing moves.

    Raises:
        ValueError: If the optimizer needs a closure, cannot be copied or is none, or a
            gradient has an unknown name or another shape than its parameter.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
        >>> predicted_step(sgd, net, {"weight": torch.tensor([[2.0]])})
        {'weight': tensor([[-1.]])}
    """
    _, steps = side_step(optimizer, model, gradients)
    return {
        name: steps.get(name, torch.zeros_like(model.get_parameter(name).data))
        for name in select_parameters(model, parameters)
    }


def clipped_gradients(
    gradients: Mapping[str, Tensor],
    *,
    max_norm: float | None = None,
    max_value: float | None = None,
) -> Params:
    """Gradients as `clip_grad_norm_` or `clip_grad_value_` would leave them.

    g·min(1, max_norm/(‖g‖₂ + 1e-6)) with the norm over all of them, or every entry
    limited to [−max_value, max_value].

    Args:
        gradients: Parameter name -> gradient; left as they are.
        max_norm: Limit of the norm, > 0.
        max_value: Limit of the entries, > 0. Give one of the two.

    Returns:
        New tensors under the same names.

    Raises:
        ValueError: If both limits or none are given, or one is not positive.

    Example:
        >>> clipped_gradients({"w": torch.tensor([3.0, -0.5])}, max_value=1.0)
        {'w': tensor([ 1.0000, -0.5000])}
    """
    given = [limit for limit in (max_norm, max_value) if limit is not None]
    if len(given) != 1 or not given[0] > 0:
        raise ValueError(
            f"clipped_gradients: max_norm={max_norm}, max_value={max_value}; expected "
            "one of them, > 0."
        )
    if max_value is not None:
        return {
            n: g.detach().clamp(-max_value, max_value) for n, g in gradients.items()
        }
    if not gradients:
        return {}
    norms = [torch.linalg.vector_norm(g.detach()) for g in gradients.values()]
    length = torch.linalg.vector_norm(
        torch.stack([norm.to(norms[0]) for norm in norms])
    )
    factor = (given[0] / (length + 1e-6)).clamp(max=1.0)
    return {name: g.detach() * factor.to(g) for name, g in gradients.items()}


def side_step(
    optimizer: Optimizer, model: nn.Module, gradients: Mapping[str, Tensor] | None
) -> tuple[dict[str, dict[str, Any]], Params]:
    """State of a copy of the optimizer after a step, and Δθ, by parameter name.

    Args:
        optimizer: As in `predicted_step`.
        model: As there.
        gradients: As there.

    Returns:
        Both for the parameters of the model that the optimizer holds.

    Raises:
        ValueError: As `predicted_step`.
    """
    named = _trained(optimizer, model)
    found = _checked(gradients, model)
    refuse_closures(optimizer)
    with torch.inference_mode(False), torch.no_grad():
        memo: dict[int, Any] = {}
        twin = optimizer_copy(optimizer, memo)
        copies = {name: memo[id(parameter)] for name, parameter in named.items()}
        for group in twin.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        for name, parameter in copies.items():
            if name in found:
                parameter.grad = found[name].detach().to(parameter, copy=True)
        try:
            take_step(twin, {parameter.device for parameter in copies.values()})
        except Exception as error:
            raise ValueError(
                f"predicted_step: a copy of {type(optimizer).__name__} with these "
                f"gradients cannot step: {error}"
            ) from error
        steps = {name: p.data - named[name].data for name, p in copies.items()}
    return {name: twin.state.get(p, {}) for name, p in copies.items()}, steps


def _trained(optimizer: Optimizer, model: nn.Module) -> dict[str, nn.Parameter]:
    if not isinstance(optimizer, Optimizer):
        raise ValueError(
            f"optimizer is a {type(optimizer).__name__}; expected a "
            "torch.optim.Optimizer (of Lightning's wrapper its `.optimizer`)."
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    named = {name: p for name, p in model.named_parameters() if id(p) in held}
    if not named:
        raise ValueError(
            f"{type(optimizer).__name__} holds no parameter of this "
            f"{type(model).__name__}; expected the model it trains."
        )
    return named


def _checked(gradients: Mapping[str, Tensor] | None, model: nn.Module) -> Params:
    parameters = dict(model.named_parameters())
    if gradients is None:
        return {n: p.grad for n, p in parameters.items() if p.grad is not None}
    for name, gradient in gradients.items():
        if name not in parameters:
            raise ValueError(
                f"gradients[{name!r}]: the model has no such parameter; expected names "
                f"such as {list(parameters)[:8]}."
            )
        if gradient.shape != parameters[name].shape:
            raise ValueError(
                f"gradients[{name!r}] has shape {tuple(gradient.shape)}; expected "
                f"{tuple(parameters[name].shape)}."
            )
    return dict(gradients)

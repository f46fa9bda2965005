"""An update of the weights that was predicted, until it is made and can be compared."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from ntk_callbacks._types import Params
from ntk_callbacks.dynamics.optimizer_step import predicted_step
from ntk_callbacks.errors import UnsupportedModelError
from ntk_callbacks.layout import widened
from ntk_callbacks.metrics.drift import norm


@dataclass(slots=True)
class PredictedUpdate:
    """The weights before an update, and the steps predicted from there, by name.

    Attributes:
        step: The update, counted from 1.
        before: θ before it: a copy.
        change: Δθ of the optimizers.
        flow: −η ∂L/∂θ of plain gradient descent.
    """

    step: int
    before: Params = field(default_factory=dict)
    change: Params = field(default_factory=dict)
    flow: Params = field(default_factory=dict)

    def add(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        gradients: Mapping[str, Tensor],
        applied: Mapping[str, Tensor],
    ) -> None:
        """Predict a step of an optimizer, on top of those predicted before.

        Args:
            model: The module that is trained.
            optimizer: Steps next, without a closure.
            gradients: Parameter name -> gradient of the loss.
            applied: The same as the optimizer will see it.

        Raises:
            UnsupportedModelError: If the step of this optimizer cannot be predicted.
        """
        rates = _signed_rates(optimizer)

        def moves(name: str, parameter: nn.Parameter) -> bool:
            trained = parameter.requires_grad or name in applied
            return id(parameter) in rates and trained

        try:
            steps = predicted_step(optimizer, model, applied, parameters=moves)
        except ValueError as error:
            raise UnsupportedModelError(
                f"PredictionMonitor: the next step cannot be predicted. {error}"
            ) from error
        for name, change in steps.items():
            parameter = model.get_parameter(name)
            flow = torch.zeros_like(change)
            if name in gradients:
                flow -= rates[id(parameter)] * gradients[name].detach()
            if name in self.before:
                self.change[name] += change
                self.flow[name] += flow
            else:
                self.before[name] = parameter.detach().clone()
                self.change[name], self.flow[name] = change, flow

    def error(self, model: nn.Module) -> Float[Tensor, ""]:
        """‖Δθ − predicted Δθ‖/‖Δθ‖; zero unless something else moved the weights.

        Args:
            model: After the update.

        Returns:
            A number ≥ 0 in float64, infinite if the weights did not move as predicted
            at all.
        """
        # In the dtype of the parameters, so that the same step differs by nothing.
        actual = {
            name: model.get_parameter(name).detach() - before
            for name, before in self.before.items()
        }
        gap = norm(
            {k: widened(step) - widened(self.change[k]) for k, step in actual.items()}
        )
        return gap if gap == 0 else gap / norm(actual)


def held_gradients(model: nn.Module, optimizer: Optimizer) -> Params:
    """What is in `.grad` of the parameters of a model that an optimizer holds.

    Args:
        model: The module that is trained.
        optimizer: One that trains it.

    Returns:
        Parameter name -> gradient, not copied; without those that have none.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {
        name: p.grad.detach()
        for name, p in model.named_parameters()
        if id(p) in held and p.grad is not None
    }


def _signed_rates(optimizer: Optimizer) -> dict[int, float]:
    """Learning rates by `id` of the parameter, negative where a loss is maximized."""
    return {
        id(p): float(group.get("lr", torch.nan)) * (-1 if group.get("maximize") else 1)
        for group in optimizer.param_groups
        for p in group["params"]
    }

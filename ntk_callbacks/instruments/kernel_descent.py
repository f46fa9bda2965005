"""SGD, with or without momentum, as the residual in a mode of a kernel obeys it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from ntk_callbacks._types import Params


@dataclass(frozen=True, slots=True)
class Descent:
    """An update of `torch.optim.SGD` by the gradient g.

    v ← βv + (1 − τ)g, the first time v ← g; then θ ← θ − ηv, or with Nesterov's
    momentum θ ← θ − η(g + βv). Without momentum θ ← θ − ηg, and v is left alone.

    Attributes:
        rate: η.
        momentum: β.
        dampening: τ.
        nesterov: Whether the gradient is taken into account once more.
    """

    rate: float
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False

    def after(
        self,
        left: Float[Tensor, " k"],
        velocity: Float[Tensor, " k"],
        rates: Float[Tensor, " k"],
        *,
        share: float = 1.0,
        begins: bool = False,
        times: int = 1,
    ) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
        """Both components of each mode after updates by the gradient of the loss.

        A left eigenvector w of sHΘ with the eigenvalue μ turns the gradient sJᵀr of a
        residual r into wᵀHJ sJᵀr = μ wᵀr, so that ρ = wᵀr and u = wᵀHJv form a system
        of their own: u ← βu + (1 − τ)μρ and ρ ← ρ − ηu, or ρ ← ρ − η(μρ + βu).

        Args:
            left: ρ.
            velocity: u.
            rates: μ.
            share: What part of the gradient the updates go by.
            begins: Whether there is no v before the first of them.
            times: How many updates.

        Returns:
            ρ and u.
        """
        if not self.momentum:
            return left * (1 - self.rate * share * rates) ** times, velocity
        for update in range(times):
            gradient = share * rates * left
            kept = 1.0 if begins and not update else 1 - self.dampening
            velocity = self.momentum * velocity + kept * gradient
            step = gradient + self.momentum * velocity if self.nesterov else velocity
            left = left - self.rate * step
        return left, velocity


def descent_of(optimizers: Sequence[Optimizer]) -> Descent | None:
    """The next update of these optimizers.

    Args:
        optimizers: All that train.

    Returns:
        None unless there is one optimizer, of type SGD, that treats all groups alike
        and descends.
    """
    if len(optimizers) != 1 or type(optimizers[0]) is not SGD:
        return None
    groups = optimizers[0].param_groups
    rules = {
        Descent(float(group["lr"]), beta, float(group["dampening"]), group["nesterov"])
        if (beta := float(group["momentum"]))
        else Descent(float(group["lr"]))
        for group in groups
    }
    if len(rules) != 1 or any(group.get("maximize") for group in groups):
        return None
    (rule,) = rules
    return rule if rule.momentum < 1 else None


def momentum_buffers(
    optimizer: Optimizer, model: nn.Module, names: Sequence[str], rule: Descent
) -> Params | None:
    """The v of an SGD by parameter, as it is now.

    Args:
        optimizer: The SGD.
        model: The module that is trained.
        names: The parameters it trains.
        rule: Its next update.

    Returns:
        None if it has not begun to keep any. 0 for a parameter that has none yet; NaN
        with dampening, which will be left out for that one alone.
    """
    parameters = {name: model.get_parameter(name) for name in names}
    # By `get`: to look a parameter up adds it to the state.
    held = {
        name: optimizer.state.get(parameter, {}).get("momentum_buffer")
        for name, parameter in parameters.items()
    }
    if all(buffer is None for buffer in held.values()):
        return None
    missing = torch.nan if rule.dampening else 0.0
    return {
        name: torch.full_like(parameters[name], missing, requires_grad=False)
        if buffer is None
        else buffer.detach().to_dense()
        for name, buffer in held.items()
    }

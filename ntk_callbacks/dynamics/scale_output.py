"""Lazy training at any width: a network that starts at 0, its output scaled."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from ntk_callbacks.dynamics.expansion import model_output
from ntk_callbacks.errors import UnsupportedModelError
from ntk_callbacks.guard import isolated_rng
from ntk_callbacks.nested import leaves, map_tensors


def scale_output(model: nn.Module, alpha: float) -> "ScaledModel":
    """The centered and scaled network α (f(x; θ) − f(x; θ₀)).

    Its kernel is α² Θ, and it starts at 0 for every input. Trained on the loss divided
    by α² (or with learning rates divided by α²) the function moves as fast as at α = 1,
    while displacement and relative change of the kernel fall as 1/α: a large α makes
    any network lazy, a small one rich.

    Two copies of the model run side by side, the second one frozen at θ₀: in the same
    mode, on the same random numbers (dropout), with running statistics of its own. The
    model itself is not touched.

    Args:
        model: Any module whose outputs are one tensor.
        alpha: α, finite and not 0.

    Returns:
        A module that is called and trains like the model.

    Raises:
        ValueError: If α is 0 or not finite, or the model is no module.
        UnsupportedModelError: If the model cannot be copied.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> scaled = scale_output(net, alpha=10.0)
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> scaled(x).item()
        0.0
        >>> with torch.no_grad():
        ...     scaled.model.bias += 0.5
        >>> round(scaled(x).item(), 3)
        5.0

    References:
        Chizat, Oyallon, Bach 2019, arXiv:1812.07956; Woodworth et al. 2020,
        arXiv:2002.09277.
    """
    if not (math.isfinite(alpha) and alpha):
        raise ValueError(f"scale_output: alpha={alpha}; expected finite and not 0.")
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"scale_output: the model is a {type(model).__name__}; expected an "
            "nn.Module."
        )
    return ScaledModel(model, alpha)


class ScaledModel(nn.Module):
    """What `scale_output` returns; see there.

    Args:
        model: As in `scale_output`.
        alpha: As there.

    Attributes:
        model: The copy that trains, f(·; θ).
        initial: The copy that does not, f(·; θ₀).
        alpha: α.

    Example:
        >>> [name for name, _ in ScaledModel(nn.Linear(2, 1), 4.0).named_parameters()]
        ['model.weight', 'model.bias', 'initial.weight', 'initial.bias']
    """

    def __init__(self, model: nn.Module, alpha: float) -> None:
        super().__init__()
        try:
            self.model, initial = copy.deepcopy(model), copy.deepcopy(model)
        except Exception as error:  # whatever an attribute raises
            raise UnsupportedModelError(
                f"scale_output: {type(model).__name__} cannot be copied ({error}). "
                "Expected a model that `copy.deepcopy` takes: detach the tensors in "
                "its attributes, or build the model anew and load its `state_dict`."
            ) from error
        self.initial = initial.requires_grad_(False)
        self.alpha = alpha
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """α (f(x; θ) − f(x; θ₀)).

        Args:
            *args: What the model takes.
            **kwargs: What the model takes.

        Returns:
            A tensor of the shape of the model's output.
        """
        # A copy of the inputs, because a model may overwrite what it is given.
        first = map_tensors(Tensor.clone, (args, kwargs))
        devices = {tensor.device for tensor in self.initial.parameters()}
        recorded = torch.is_grad_enabled() and any(
            t.requires_grad for t in leaves(first)
        )
        # The second network draws the same random numbers again.
        with isolated_rng(devices), torch.set_grad_enabled(recorded):
            start = model_output(self.initial, None, *first)
        return self.alpha * (model_output(self.model, None, args, kwargs) - start)

    def extra_repr(self) -> str:
        """The scale."""
        return f"alpha={self.alpha}"

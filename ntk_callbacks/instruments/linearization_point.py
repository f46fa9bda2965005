"""θ₀: the weights and buffers around which a network is linearized."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ntk_callbacks._types import Params
from ntk_callbacks.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True, eq=False)
class LinearizationPoint:
    """Copies of everything that f₀ and J₀ depend on.

    Attributes:
        parameters: θ₀ by name, frozen parameters too.
        buffers: What the buffers were there (running statistics), by name.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> point = LinearizationPoint.of(net)
        >>> _ = net.weight.data.add_(2.0)
        >>> point.displacement(dict(net.named_parameters()))
        {'weight': tensor([[2.]])}
    """

    parameters: Params
    buffers: Params

    @classmethod
    def of(cls, model: nn.Module) -> "LinearizationPoint":
        """Where a model stands now.

        Args:
            model: Left as it is.

        Returns:
            Copies of its parameters and buffers.
        """
        return cls(_copies(model.named_parameters()), _copies(model.named_buffers()))

    def displacement(self, named: Mapping[str, Tensor]) -> Params:
        """θ − θ₀ by name; of half-precision numbers in full precision.

        Args:
            named: θ, the same parameters as at θ₀.

        Returns:
            A tensor for every parameter.

        Raises:
            UnsupportedModelError: If parameters came, went, or changed their shape.
        """
        self.refuse_others(named)
        return {
            name: _wide(p.detach()) - _wide(self.parameters[name].to(p.device))
            for name, p in named.items()
        }

    def refuse_others(self, named: Mapping[str, Tensor]) -> None:
        """See to it that the parameters are still those of θ₀.

        Args:
            named: θ.

        Raises:
            UnsupportedModelError: If parameters came, went, or changed their shape.
        """
        other = {
            *(named.keys() ^ self.parameters.keys()),
            *(n for n, p in self.parameters.items() if _shape(named, n) != p.shape),
        }
        if other:
            raise UnsupportedModelError(
                f"LinearizationMonitor: the parameters {sorted(other)[:8]} are not "
                "those of the first measurement, around which the network is "
                "linearized. Start a new run."
            )

    def put_into(self, model: nn.Module) -> None:
        """Bring a model back to θ₀, in place.

        Args:
            model: Inside a guard that undoes this.
        """
        for name, parameter in model.named_parameters():
            parameter.data.copy_(self.parameters[name])
        for name, buffer in model.named_buffers():
            if name in self.buffers:
                buffer.data.copy_(self.buffers[name])

    def state_dict(self) -> dict[str, Any]:
        """Both as plain dicts; the tensors are never written to."""
        return {"parameters": self.parameters, "buffers": self.buffers}


def _copies(named: Any) -> Params:
    with torch.inference_mode(False):
        return {name: tensor.detach().clone() for name, tensor in named}


def _shape(named: Mapping[str, Tensor], name: str) -> torch.Size | None:
    return named[name].shape if name in named else None


def _wide(tensor: Tensor) -> Tensor:
    half = tensor.is_floating_point() and tensor.dtype.itemsize < 4
    return tensor.float() if half else tensor

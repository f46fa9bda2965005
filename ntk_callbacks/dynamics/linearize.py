"""The linearized twin of a network: a module that trains like any other."""

import copy
from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ntk_callbacks._types import Mode, OutputFunction, Params
from ntk_callbacks.dynamics.expansion import (
    Expansion,
    full_precision,
    model_output,
)
from ntk_callbacks.engine.arguments import check_choice
from ntk_callbacks.errors import UnsupportedModelError
from ntk_callbacks.functional import ModelFunction
from ntk_callbacks.guard import measuring


def linearize(
    model: nn.Module, *, output_fn: OutputFunction | None = None, mode: Mode = "eval"
) -> "LinearizedModel":
    """The linearized twin of a model, f(x; θ₀) + J(x; θ₀)(θ − θ₀) with J = ∂f/∂θ.

    θ₀ is where the model stands now. The twin starts there, with parameters of the same
    names, shapes and `requires_grad`, and trains with any loss and optimizer: its
    tangent kernel is that of the model at θ₀ for good, and what the network does beyond
    it is what its features learned.

    The model itself is copied and not touched. Of the copy everything but θ is held
    fixed: θ₀ and its buffers (running statistics) too, in the twin's `state_dict` under
    `linearization_point` and the names of the model. Parameters that are frozen enter
    with their displacement, which is zero unless somebody moves them.

    A step costs about two forward passes and one training step of the model, and holds
    no more memory. Where forward mode cannot go (fused attention kernels have none) or
    would be wrong, J·v comes from double backward, two to three times as dear; the
    first call finds out which by ⟨u, J v⟩ = ⟨Jᵀu, v⟩.

    Args:
        model: Any module, called in any way. Tied parameters stay tied.
        output_fn: `(model, x) -> tensor`, for models that return more than one tensor;
            `x` is what the twin is called with: one value, a tuple or a dict.
        mode: `"eval"`: of the network with running statistics and without dropout.
            `"train"`: of the joint batch through BatchNorm's batch statistics, whose
            running values do not move; dropout is off here too. `train()` and `eval()`
            of the twin change nothing: there is one linear function.

    Returns:
        A module that is called like the model and returns one tensor, in the dtype of
        the parameters (float32 for half-precision models, and under autocast).

    Raises:
        ValueError: If the model has no parameter to train, or an argument is not
            understood.
        UnsupportedModelError: If the model cannot be copied or its parameters are
            complex, lazy or sharded; at the first call, if its outputs are random, more
            than one, or cannot be differentiated.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> x = torch.randn(5, 2)
        >>> twin = linearize(net)
        >>> torch.allclose(twin(x), net(x))
        True
        >>> sgd = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
        >>> twin(x).square().sum().backward()
        >>> sgd.step()
        >>> [name for name, _ in twin.named_parameters()]
        ['0.weight', '0.bias', '2.weight', '2.bias']

    References:
        Lee et al. 2019, arXiv:1902.06720 (linearized networks); Townsend 2017, "A new
        trick for calculating Jacobian vector products".
    """
    check_choice("mode", mode, get_args(Mode))
    _check_model(model)
    return LinearizedModel(model, output_fn, mode)


class LinearizedModel(nn.Module):
    """What `linearize` returns; see there.

    Args:
        model: As in `linearize`.
        output_fn: As there.
        mode: As there.

    Attributes:
        linearization_point: θ₀ as buffers, under the names of the parameters.
        mode: `"eval"` or `"train"`.

    Example:
        >>> twin = LinearizedModel(nn.Linear(2, 1))
        >>> [name for name, _ in twin.linearization_point.named_buffers()]
        ['weight', 'bias']
    """

    def __init__(
        self,
        model: nn.Module,
        output_fn: OutputFunction | None = None,
        mode: Mode = "eval",
    ) -> None:
        super().__init__()
        inner = _expandable_copy(model, output_fn)
        with measuring(inner, mode):
            training = {module: module.training for module in inner.modules()}
        for module, flag in training.items():
            module.training = flag
        # The members of the copy under their own names, without the copy itself, whose
        # name would stand before them: the tuple hides it.
        self._inner = (inner,)
        self._parameters = inner._parameters
        self._buffers = inner._buffers
        self._non_persistent_buffers_set = inner._non_persistent_buffers_set
        self._modules = dict(inner._modules)
        self.linearization_point = _buffers_named(
            {name: p.detach().clone() for name, p in inner.named_parameters()}
        )
        self.mode, self.output_fn = mode, output_fn
        self._way: str | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """f(x; θ₀) + J(x; θ₀)(θ − θ₀).

        Args:
            *args: What the model takes.
            **kwargs: What the model takes.

        Returns:
            One tensor, of the shape of the model's output.
        """
        recorded = torch.is_grad_enabled()
        with full_precision(self._inner[0]):
            theta = dict(self.named_parameters())
            point = dict(self.linearization_point.named_buffers())
            moved = _moved(theta, point)
            expansion = Expansion(
                self._inner[0], point, moved, self._evaluate, (args, kwargs)
            )
            if self._way is None:
                self._way = expansion.agreeing_way()
            chosen = [theta[name] for name in expansion.names]
            value = expansion.value(chosen, self._way)
            if recorded:
                value = _WithGradient.apply(
                    value, expansion, *chosen, *expansion.sources
                )
            return value

    def _evaluate(self, model: nn.Module, inputs: Any) -> Tensor:
        args, kwargs = inputs
        return model_output(model, self.output_fn, args, kwargs)

    def train(self, mode: bool = True) -> "LinearizedModel":
        """Only sets the flag: the layers stay in the state they were expanded in."""
        self.training = mode
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> "LinearizedModel":
        # By the copy: recurrent layers, for example, have more to move than tensors.
        members: list[Any] = [self._inner[0], self.linearization_point]
        for member in members:
            member._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        """What is expanded, and how."""
        return f"of {type(self._inner[0]).__name__}, mode={self.mode!r}"


class _WithGradient(torch.autograd.Function):
    """A value of the expansion, whose gradients are those of the expansion."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, expansion: Expansion, *tensors: Tensor
    ) -> Tensor:
        ctx.expansion = expansion
        ctx.save_for_backward(*tensors)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> tuple[Tensor | None, ...]:
        tensors, split = ctx.saved_tensors, len(ctx.expansion.names)
        sources = tensors[split:] if any(ctx.needs_input_grad[2 + split :]) else []
        found = ctx.expansion.gradients(weights[0], tensors[:split], sources)
        return None, None, *found, *[None] * (len(tensors) - len(found))


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"linearize: the model is a {type(model).__name__}; expected an nn.Module."
        )
    if hasattr(model, "linearization_point"):
        raise ValueError(
            f"linearize: {type(model).__name__} has a member `linearization_point`; "
            "expected a model that is not linearized yet. What is linear in θ is its "
            "own linearization: copy it with `copy.deepcopy`."
        )


def _expandable_copy(model: nn.Module, output_fn: OutputFunction | None) -> nn.Module:
    ModelFunction(model, output_fn=output_fn)  # raises where nothing can be expanded
    try:
        with torch.inference_mode(False):
            return copy.deepcopy(model)
    except Exception as error:  # whatever an attribute raises
        raise UnsupportedModelError(
            f"linearize: {type(model).__name__} cannot be copied ({error}). Expected a "
            "model that `copy.deepcopy` takes: detach the tensors in its attributes, "
            "or build the model anew and load its `state_dict`."
        ) from error


def _buffers_named(tensors: Params) -> nn.Module:
    """A tree of modules that hold nothing but these tensors, under these names."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_buffer(last, tensor)
    return root


def _moved(theta: Mapping[str, Tensor], point: Params) -> set[str]:
    """Names of the parameters that train, or were displaced and frozen afterwards."""
    moved = {
        name
        for name, tensor in theta.items()
        if tensor.requires_grad or not torch.equal(tensor, point[name])
    }
    return moved or set(theta)

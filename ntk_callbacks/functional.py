"""From a module to a pure function of its parameters."""

import re
from collections.abc import Callable
from functools import reduce
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy

from ntk_callbacks._types import Inputs, OutputFunction, ParameterFilter, Params
from ntk_callbacks.errors import UnsupportedModelError
from ntk_callbacks.nested import batch_size, map_tensors
from ntk_callbacks.outputs import call_model, flat_outputs
from ntk_callbacks.snapshot import Attributes

_Result = TypeVar("_Result")


def select_parameters(model: nn.Module, parameters: ParameterFilter) -> list[str]:
    """Names of the parameters to differentiate, in the order of the model.

    Args:
        model: Any module. Tied parameters appear once, under their first name.
        parameters: None for those with `requires_grad`; a regular expression (searched
            in the name) among those; or a predicate `(name, parameter)`, which alone
            decides and may also take frozen parameters.

    Returns:
        At least one name.

    Raises:
        ValueError: If `parameters` is none of these, or nothing is selected.
    """
    named = dict(model.named_parameters())
    if callable(parameters):
        names = [name for name, tensor in named.items() if parameters(name, tensor)]
    else:
        pattern = compiled("parameters", "" if parameters is None else parameters)
        names = [
            name
            for name, tensor in named.items()
            if tensor.requires_grad and pattern.search(name)
        ]
    if not names:
        asked = "" if parameters is None else f" that `parameters={parameters!r}` takes"
        known = ", ".join(list(named)[:8]) + (", …" if len(named) > 8 else "")
        raise ValueError(
            f"{type(model).__name__} has no parameter with requires_grad{asked}; it "
            f"has {len(named)} parameters: {known or 'none'}. To measure frozen ones "
            "pass a predicate, for example `parameters=lambda name, p: True`."
        )
    return names


def compiled(argument: str, value: object) -> re.Pattern[str]:
    """The regular expression of an argument; a ValueError names both if it is none."""
    try:
        if isinstance(value, str | re.Pattern):
            return re.compile(value)
        reason = f"expected a text, not a {type(value).__name__}"
    except re.error as error:
        reason = str(error)
    raise ValueError(f"{argument}={value!r} is no regular expression: {reason}.")


def check_output_fn(output_fn: object) -> None:
    """Raises a ValueError if `output_fn` is neither None nor callable."""
    if not (output_fn is None or callable(output_fn)):
        raise ValueError("output_fn must be callable (model, x) -> (n, ...).")


class ModelFunction:
    """A module as a pure function f(params, x) -> (n, c).

    Holds detached copies of everything the module owns, half-precision tensors as
    float32. A call swaps them into the module, runs `output_fn` and swaps them out.

    Args:
        model: The module, already in the state it is measured in.
        output_fn: `(model, x) -> (n, ...)`; None calls the model on the batch.
        parameters: Which parameters are differentiated; see `select_parameters`.
        pseudo: Replace the c outputs by their sum divided by √c.

    Attributes:
        name: Class of the model.
        params: The parameters to differentiate, detached.
        fixed: All other parameters, detached.
        trained: Names of the parameters with `requires_grad`, measured or not.
        originals: `id` of each parameter of the model -> its name.

    Raises:
        ValueError: If `parameters` or `output_fn` is not understood.
        UnsupportedModelError: If parameters are complex, lazy, sparse, sharded or
            belong to a module compiled by torch.jit.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        output_fn: OutputFunction | None = None,
        parameters: ParameterFilter = None,
        pseudo: bool = False,
    ) -> None:
        check_output_fn(output_fn)
        _refuse_unmeasurable(model)
        self.name = type(model).__name__
        named = dict(model.named_parameters())
        self.trained = {name for name, tensor in named.items() if tensor.requires_grad}
        self.originals = {id(tensor): name for name, tensor in named.items()}
        selected = set(select_parameters(model, parameters))
        tensors = {k: _full_precision(v.detach()) for k, v in named.items()}
        self.params: Params = {k: v for k, v in tensors.items() if k in selected}
        self.fixed: Params = {k: v for k, v in tensors.items() if k not in selected}
        buffers = dict(model.named_buffers())
        self._buffers = {k: _full_precision(v.detach()) for k, v in buffers.items()}
        # Every place of every tensor, those of tied ones too: torch (#164759) restores
        # wrongly a place that it reaches by two names of one module.
        first = {id(tensor): name for name, tensor in (named | buffers).items()}
        self._places = {
            ".".join(filter(None, ("model", path, key))): first[id(tensor)]
            for path, module in model.named_modules()
            for key, tensor in (module._parameters | module._buffers).items()
            if tensor is not None
        }
        self._outputs = _Outputs(model, output_fn or call_model, pseudo)
        self.dtype = _common_dtype(tensors.values())
        self.device = next(iter(self.params.values())).device

    def __call__(self, params: Params, x: Inputs) -> Float[Tensor, "n c"]:
        """Outputs at the given parameters; those not given keep their own value."""
        return self.during(params, x, lambda outputs: outputs)

    def during(
        self, params: Params, x: Inputs, then: Callable[[Tensor], _Result]
    ) -> _Result:
        """`then(outputs)`, run while `params` are still those of the module."""
        # Recomputation in a backward pass (activation checkpointing) looks the
        # parameters up again, so the backward pass has to happen in here.
        # Buffers are cloned: train-mode BatchNorm updates them even when detached.
        state = self.params | self.fixed | params
        state |= {name: buffer.clone() for name, buffer in self._buffers.items()}
        placed = {place: state[name] for place, name in self._places.items()}
        # What is kept from one call to the next (a weight that is computed once and for
        # all) would be that of other parameters.
        before = Attributes(self._outputs.model)
        try:
            result: _Result = functional_call(
                self._outputs, placed, (x, then), tie_weights=False
            )
        finally:
            before.restore()
        return result

    def prepare(self, x: Inputs) -> Inputs:
        """A batch on the device of the parameters, floating tensors in their dtype."""

        def move(tensor: Tensor) -> Tensor:
            if tensor.is_complex():
                raise UnsupportedModelError(
                    f"the inputs are {tensor.dtype}; kernels of complex inputs are not "
                    "defined here. Pass real and imaginary parts as two real channels."
                )
            if tensor.layout != torch.strided or tensor.is_nested:
                raise UnsupportedModelError(
                    "the inputs are sparse or nested tensors, of which no example can "
                    "be taken. Pass dense tensors, and an `output_fn` that makes of "
                    "them what the model needs."
                )
            dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
            # `clone` leaves inference mode behind for good.
            moved = tensor.detach().to(self.device, dtype)
            return moved.clone() if moved.is_inference() else moved

        prepared: Inputs = map_tensors(move, x)
        return prepared


class _Outputs(nn.Module):
    """`functional_call` needs a module: this one is `output_fn` of the model."""

    def __init__(
        self, model: nn.Module, output_fn: OutputFunction, pseudo: bool
    ) -> None:
        super().__init__()
        self.model = model
        self.output_fn = output_fn
        self.pseudo = pseudo

    def forward(self, x: Inputs, then: Callable[[Tensor], Any]) -> Any:
        # A copy of the inputs, because a model may overwrite what it is given.
        outputs = self.output_fn(self.model, map_tensors(Tensor.clone, x))
        outputs = flat_outputs(outputs, batch_size(x))
        if self.pseudo:
            outputs = outputs.sum(1, keepdim=True) / outputs.shape[1] ** 0.5
        return then(outputs)


def _refuse_unmeasurable(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModelError(
                f"{name or type(model).__name__!r} is compiled by torch.jit, which "
                "does not let its parameters be exchanged. Measure the module it was "
                "made from."
            )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise UnsupportedModelError(
                f"{name!r} is lazy and has no shape yet. Run one batch through the "
                "model first."
            )
    for name, parameter in model.named_parameters():
        if parameter.is_complex():
            raise UnsupportedModelError(
                f"parameter {name!r} is {parameter.dtype}; the kernel of complex "
                "parameters is not defined here. Store real and imaginary parts as two "
                "real parameters (torch.view_as_real)."
            )
        if parameter.layout != torch.strided:
            raise UnsupportedModelError(
                f"parameter {name!r} is sparse ({parameter.layout}); its kernel is not "
                "defined here. Store its values as a dense parameter."
            )
        kind = type(parameter).__name__
        if "DTensor" in kind or kind == "FlatParameter" or hasattr(parameter, "ds_id"):
            raise UnsupportedModelError(
                f"parameter {name!r} is sharded over processes ({kind}); kernels are "
                "measured on one process. Gather the parameters first, or train with "
                "DDP or on one device."
            )


def _full_precision(tensor: Tensor) -> Tensor:
    if tensor.is_inference():
        tensor = tensor.clone()
    half = tensor.is_floating_point() and tensor.dtype.itemsize < 4
    return tensor.float() if half else tensor


def _common_dtype(tensors: Any) -> torch.dtype:
    floating = (tensor.dtype for tensor in tensors if tensor.is_floating_point())
    return reduce(torch.promote_types, floating, torch.float32)

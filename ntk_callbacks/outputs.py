"""What a model returned, as the outputs `(n, c)` that are measured."""

import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from jaxtyping import Float
from torch import OutOfMemoryError, Tensor, nn

from ntk_callbacks._types import Inputs
from ntk_callbacks.errors import UnsupportedModelError
from ntk_callbacks.nested import map_tensors


def call_model(model: nn.Module, x: Inputs) -> Tensor:
    """The default `output_fn`: the logits of `model(x)`.

    A tuple or list is unpacked into positional arguments, a mapping into keywords. A
    result that holds `logits`, or exactly one tensor, stands for that tensor.

    Args:
        model: Any module.
        x: One batch.

    Returns:
        A tensor `(n, ...)`.

    Raises:
        UnsupportedModelError: If the result is not one tensor, or the model has no
            `forward` or one that takes other inputs.
        Exception: If the model itself raises it; a note says what it was given.
    """
    if type(model).forward in (nn.Module.forward, _lightning_forward(model)):
        raise UnsupportedModelError(
            f"{type(model).__name__} does not define `forward`. Pass what to call, for "
            "example `output_fn=lambda module, x: module.net(x)`."
        )
    args = () if isinstance(x, Mapping) else (x,) if isinstance(x, Tensor) else x
    kwargs = x if isinstance(x, Mapping) else {}
    try:
        result = model(*args, **kwargs)
    except Exception as error:
        if isinstance(error, TypeError):
            _explain(model, args, kwargs, error)
        _note_inputs(model, x, error)
        raise
    return _single_tensor(result, type(model).__name__)


def _explain(model: nn.Module, args: Any, kwargs: Any, error: TypeError) -> None:
    """An error that helps, if the inputs are not what `forward` takes."""
    try:
        signature = inspect.signature(model.forward)
    except ValueError:  # code that has none
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        if kwargs:
            given = f"the keywords {', '.join(kwargs)}"
            how = f"model(x[{next(iter(kwargs))!r}])`, or `model(x)` with the mapping"
        else:
            given = "1 input" if len(args) == 1 else f"{len(args)} inputs"
            how = "model(x, …)`" if len(args) == 1 else "model(x[0])`"
        raise UnsupportedModelError(
            f"{type(model).__name__}.forward{signature} cannot be called with {given} "
            f"({error}). Pass how to call it: `output_fn=lambda model, x: {how}."
        ) from error


def _note_inputs(model: nn.Module, x: Inputs, error: Exception) -> None:
    """Say what was given to a model that may have expected something else."""
    if isinstance(error, UnsupportedModelError | OutOfMemoryError):
        return
    kinds = map_tensors(lambda t: f"{t.dtype} {tuple(t.shape)}", x)
    error.add_note(
        f"{type(model).__name__} was called with {kinds}. If it expects something "
        "else, pass other inputs, or `output_fn=lambda model, x: …` to say how to "
        "call it."
    )


def _lightning_forward(model: nn.Module) -> Any:
    """`LightningModule.forward`, which only raises, without importing Lightning."""
    for kind in type(model).__mro__:
        if kind.__name__ == "LightningModule":
            return vars(kind).get("forward")
    return None


def _single_tensor(result: Any, who: str) -> Tensor:
    if isinstance(result, Tensor):
        return result
    if isinstance(result, Mapping):
        entries = dict(result)
    elif isinstance(result, tuple | list):
        entries = {str(index): value for index, value in enumerate(result)}
    else:
        entries = dict(getattr(result, "__dict__", {}))
        named = fields(result) if is_dataclass(result) else ()  # may have slots
        entries |= {field.name: getattr(result, field.name, None) for field in named}
    tensors = {k: v for k, v in entries.items() if isinstance(v, Tensor)}
    if "logits" in tensors:
        return tensors["logits"]
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    shapes = ", ".join(f"{key}: {tuple(v.shape)}" for key, v in tensors.items())
    raise UnsupportedModelError(
        f"{who} returned a {type(result).__name__} with {len(tensors)} tensors "
        f"({shapes}); one tensor (n, ...) is needed. Pass the one to measure, for "
        "example `output_fn=lambda model, x: model(x)[0]`."
    )


def flat_outputs(outputs: Any, n: int) -> Float[Tensor, "n c"]:
    """Outputs `(n, ...)` as `(n, c)`.

    Args:
        outputs: What the model, or an `output_fn`, returned.
        n: Number of examples that went in.

    Returns:
        The same numbers, trailing axes flattened.

    Raises:
        UnsupportedModelError: If the outputs are no tensor, nor hold one that can be
            told from others, are complex or integers, or their first axis is not the
            batch.
    """
    tensor = _single_tensor(outputs, "output_fn")
    if not tensor.is_floating_point():
        raise UnsupportedModelError(
            f"the outputs are {tensor.dtype}; a kernel needs real numbers. Pass "
            "an `output_fn` that returns logits, or real and imaginary parts."
        )
    if tensor.ndim == 0 or tensor.shape[0] != n:
        raise UnsupportedModelError(
            f"the outputs have shape {tuple(tensor.shape)} for {n} examples; the "
            "first axis must be the examples. Pass an `output_fn` that puts it first."
        )
    return tensor.reshape(n, -1)

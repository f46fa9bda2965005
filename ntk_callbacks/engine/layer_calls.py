"""The calls of chosen layers during a forward pass, and where their examples lie."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ntk_callbacks._types import Inputs
from ntk_callbacks.engine.affine import is_affine
from ntk_callbacks.engine.coupling import forward
from ntk_callbacks.errors import UnsupportedModelError
from ntk_callbacks.functional import ModelFunction, compiled
from ntk_callbacks.nested import batch_size, examples, leaves

LayerFilter: TypeAlias = (
    str | type | tuple[type, ...] | Callable[[str, nn.Module], bool] | None
)
"""A regular expression on names, types, a predicate `(name, module)`, or None."""

Seen: TypeAlias = Callable[[str, nn.Module, list[Tensor], Tensor], None]
"""Told of each call: its name, the layer, the floating tensors it got, its output."""


def check_layers(layers: object) -> None:
    """Refuse a selection that no model could take.

    Args:
        layers: As in `signal_statistics`.

    Raises:
        ValueError: If it is none of the kinds, or no regular expression.
    """
    types = isinstance(layers, tuple) and all(isinstance(t, type) for t in layers)
    if not (layers is None or callable(layers) or types):
        compiled("layers", layers)


def chosen_layers(model: nn.Module, layers: LayerFilter) -> dict[str, nn.Module]:
    """Name -> module of the chosen layers, each module once.

    Args:
        model: Any module.
        layers: As in `signal_statistics`.

    Returns:
        At least one layer.

    Raises:
        UnsupportedModelError: If nothing is chosen.
    """
    named = dict(model.named_modules())
    if isinstance(layers, type | tuple):
        kinds = layers
        found = [name for name, part in named.items() if isinstance(part, kinds)]
    elif callable(layers):
        found = [name for name, part in named.items() if layers(name, part)]
    else:
        pattern = compiled("layers", "" if layers is None else layers)
        found = [
            name
            for name, part in named.items()
            if is_affine(part) and pattern.search(name)
        ]
    if not found:
        why = nothing_to_see(model, layers, "has no layer that is chosen")
        raise UnsupportedModelError(why)
    return {name: named[name] for name in found}


def nothing_to_see(model: nn.Module, layers: object, why: str) -> str:
    """The message that names what could be chosen instead."""
    asked = "" if layers is None else f" by layers={layers!r}"
    known = [
        f"{name} ({type(part).__name__})"
        for name, part in model.named_modules()
        if name and next(part.children(), None) is None
    ]
    listed = ", ".join(known[:8]) + (", …" if len(known) > 8 else "")
    return (
        f"{type(model).__name__} {why}{asked}; signals are those of linear and "
        f"convolutional layers unless told otherwise. It is made of {listed or 'none'}:"
        " pass a type, as in layers=nn.GRU, or a predicate (name, module)."
    )


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Call hooks after the forward passes of modules, for a while.

    Args:
        hooks: Module and `(module, args, kwargs, result) -> result or None`.

    Yields:
        Nothing.
    """
    handles = []
    try:
        for module, hook in hooks:
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watched(chosen: dict[str, nn.Module], seen: Seen) -> Iterator[None]:
    """Tell `seen` of every call of the chosen layers; hooks go on exceptions too.

    Args:
        chosen: Name -> module.
        seen: Its first argument is the name of the layer, ending in `.call2` at its
            second call.

    Yields:
        Nothing.
    """
    calls: dict[str, int] = {}

    def hook(name: str, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        h = _signal(name, module, result)
        calls[name] = calls.get(name, 0) + 1
        call = name or type(module).__name__
        call += "" if calls[name] == 1 else f".call{calls[name]}"
        given = [t for t in leaves((args, kwargs)) if t.is_floating_point()]
        seen(call, module, given, h)

    with hooked((module, partial(hook, name)) for name, module in chosen.items()):
        yield


def _signal(name: str, module: nn.Module, result: Any) -> Tensor:
    if isinstance(module, nn.RNNBase) and isinstance(result, tuple):
        result = result[0]
    tensors = [tensor for tensor in leaves(result) if tensor.is_floating_point()]
    if len(tensors) == 1:
        return tensors[0]
    raise UnsupportedModelError(
        f"layer {name!r} ({type(module).__name__}) returns a {type(result).__name__} "
        f"with {len(tensors)} floating tensors; a signal is one tensor. Choose other "
        "layers: layers= takes a regular expression, types, or a predicate."
    )


def batch_axes(
    function: ModelFunction, x: Inputs, chosen: dict[str, nn.Module]
) -> Callable[[str, torch.Size], int | None]:
    """Which axis of an output holds the examples.

    It is the one that gets shorter when the last example is left out: other axes may
    happen to have the same length.

    Args:
        function: The model.
        x: All examples.
        chosen: The layers.

    Returns:
        A function of the name of a call and the shape of its output: the axis, or None
        where the examples share it with something else (windows, time steps).
    """
    n = batch_size(x)
    fewer: dict[str, torch.Size] = {}

    def seen(name: str, _module: nn.Module, _given: list[Tensor], h: Tensor) -> None:
        fewer[name] = h.shape

    try:
        with watched(chosen, seen):
            forward(function, examples(x, 0, n - 1))
    except Exception:  # a model may need its whole batch; the first axis then
        fewer = {}

    return lambda name, shape: example_axis(shape, fewer.get(name), n)


def example_axis(shape: torch.Size, fewer: torch.Size | None, n: int) -> int | None:
    """The axis of length n that got shorter when one example was left out.

    Args:
        shape: Of a tensor for n examples.
        fewer: Its shape for n − 1 of them; None if that is not known.
        n: Number of examples.

    Returns:
        The axis; the first if `fewer` is not known; None if no axis is theirs alone.
    """
    if fewer is None:
        return 0 if shape[:1] == (n,) else None
    changed = [k for k in range(len(shape)) if shape[k : k + 1] != fewer[k : k + 1]]
    fits = len(fewer) == len(shape) and len(changed) == 1 and shape[changed[0]] == n
    return changed[0] if fits else None

"""ReLU-like gates: which functions they are, and their calls in a forward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Gate:
    """A piecewise linear function: where its slope changes, and where it is not 0.

    Args:
        elbows: Arguments of the torch function -> elbows e, ascending.
        sloped: Pieces, counted from 0 at −∞, whose slope is not 0; None for all.
    """

    elbows: Callable[..., tuple[float, ...]]
    sloped: tuple[int, ...] | None


def _at_zero(*_args: Any, **_kwargs: Any) -> tuple[float, ...]:
    return (0.0,)


def _relu6(*_args: Any, **_kwargs: Any) -> tuple[float, ...]:
    return 0.0, 6.0


def _hardsigmoid(*_args: Any, **_kwargs: Any) -> tuple[float, ...]:
    return -3.0, 3.0


def _hardtanh(
    _x: Any, min_val: Any = -1.0, max_val: Any = 1.0, *_args: Any, **_kwargs: Any
) -> tuple[float, ...]:
    return float(min_val), float(max_val)


def _threshold(_x: Any, threshold: Any, *_args: Any, **_kw: Any) -> tuple[float, ...]:
    return (float(threshold),)


def _shrink(_x: Any, lambd: Any = 0.5, **_kwargs: Any) -> tuple[float, ...]:
    return -float(lambd), float(lambd)


# By name: functional, torch and Tensor have a function of each, and some one in place.
GATES = {
    "relu": Gate(_at_zero, (1,)),
    "relu6": Gate(_relu6, (1,)),
    "leaky_relu": Gate(_at_zero, None),
    "prelu": Gate(_at_zero, None),
    "rrelu": Gate(_at_zero, None),
    "hardtanh": Gate(_hardtanh, (1,)),
    "hardsigmoid": Gate(_hardsigmoid, (1,)),
    "threshold": Gate(_threshold, (1,)),
    "hardshrink": Gate(_shrink, (0, 2)),
    "softshrink": Gate(_shrink, (0, 2)),
}
"""Torch function, without underscores around its name -> what kind of gate it is."""

SeenGate: TypeAlias = Callable[[str, Gate, tuple[float, ...], Tensor], None]
"""Told of each call: its name, the gate, its elbows, what it is given."""


class _Watch(TorchFunctionMode):
    def __init__(self, seen: Callable[[Gate, tuple[float, ...], Tensor], None]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        gate = GATES.get(getattr(func, "__name__", "").strip("_"))
        if gate is not None:
            options = {k: v for k, v in kwargs.items() if k not in ("input", "self")}
            h = args[0] if args else kwargs.get("input", kwargs.get("self"))
            # Before the call, which may work in place.
            self._seen(gate, gate.elbows(h, *args[1:], **options), h.detach())
        return func(*args, **kwargs)


@contextmanager
def gate_calls(model: nn.Module, seen: SeenGate) -> Iterator[None]:
    """Tell `seen` of every call of a gate; hooks go on exceptions too.

    Args:
        model: Its modules give the calls their names.
        seen: Told the name of the call, the gate, its elbows, and what it is given.

    Yields:
        Nothing.
    """
    inside: list[str] = []
    calls: dict[str, int] = {}

    def enter(name: str, _module: nn.Module, _args: Any) -> None:
        inside.append(name)

    def leave(_module: nn.Module, _args: Any, _result: Any) -> None:
        inside.pop()

    def called(gate: Gate, elbows: tuple[float, ...], h: Tensor) -> None:
        name = (inside[-1] if inside else "") or type(model).__name__
        calls[name] = calls.get(name, 0) + 1
        name += "" if calls[name] == 1 else f".call{calls[name]}"
        seen(name, gate, elbows, h)

    handles = []
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(partial(enter, name)))
            handles.append(module.register_forward_hook(leave, always_call=True))
        with _Watch(called):
            yield
    finally:
        for handle in handles:
            handle.remove()

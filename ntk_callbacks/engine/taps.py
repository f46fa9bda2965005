"""One forward pass, and where in it each parameter meets the data.

A parameter acts on an example only through the functions that take it together with
something computed from the inputs. Each such call is a *tap*: its parameters are
detached, so that no backward pass ever forms their gradient, and the place of its
output in the graph is remembered, so that a backward pass can stop there. What is
computed from parameters alone (a transposed, sliced or normalized weight) is no tap: it
keeps its graph, and the tap that uses it knows it as its source.
"""

import weakref
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from ntk_callbacks._types import Inputs, Params
from ntk_callbacks.nested import leaves, map_tensors


@dataclass(frozen=True, eq=False)
class Tap:
    """A call of a torch function that takes parameters together with data.

    Args:
        function: The torch function.
        args: Its positional arguments, every tensor detached.
        kwargs: Its keyword arguments, every tensor detached.
        sources: `id` of a detached parameter among the arguments -> the tensor it was
            detached from: a leaf, or computed from leaves alone.
        data: `id` of each argument that is computed from the inputs.
        shape: Shape of the output.
        edge: Where the gradient by the output arrives.
        versions: Tensors that must not change before they are used, each with its
            version at the time of the call.
        part_of: Number of the function that it was unrolled from; None if of none.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sources: dict[int, Tensor]
    data: frozenset[int]
    shape: torch.Size
    edge: GradientEdge
    versions: list[tuple[Tensor, int]]
    part_of: int | None = None

    @property
    def unchanged(self) -> bool:
        """Whether the arguments still hold what they held in the forward pass."""
        return all(tensor._version == version for tensor, version in self.versions)


class Recorder(TorchFunctionMode):
    """Records the taps of the calls made while it is active.

    Args:
        parameters: Those whose taps are wanted; leaves that require a gradient.
        inputs: The batch, whose tensors are data.
        known: Functions that are taps as they are; others written in Python are looked
            into, for the functions they call.
        unrolled: Torch function -> the same by others, or None.
    """

    def __init__(
        self,
        parameters: Params,
        inputs: Inputs,
        known: Container[Callable[..., Any]],
        unrolled: Mapping[Callable[..., Any], Callable[..., Any]],
    ) -> None:
        super().__init__()
        self._known = known
        self._unrolled = unrolled
        self._part_of: int | None = None
        self._count = 0
        self.hooked = False
        """Whether the model looks at gradients, and may change them."""
        self.largest = 0
        """Numbers of the largest tensor that is computed from the inputs."""
        self.taps: list[Tap] = []
        self._parametric = {id(leaf): leaf for leaf in parameters.values()}
        self._data: dict[int, weakref.ref[Tensor]] = {}
        self._taint(inputs)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a torch function, and record it if it is a tap.

        Args:
            func: What the model calls.
            types: Unused.
            args: Its positional arguments.
            kwargs: Its keyword arguments.

        Returns:
            What the function returns.
        """
        kwargs = kwargs or {}
        self.hooked = self.hooked or func is Tensor.register_hook
        tensors = [*leaves(args), *leaves(kwargs)]
        parametric = [tensor for tensor in tensors if self._is_parametric(tensor)]
        data = [tensor for tensor in tensors if self._is_data(tensor)]
        if not data:
            result = func(*args, **kwargs)
            if parametric:
                for tensor in leaves(result):
                    if tensor.requires_grad:
                        self._parametric[id(tensor)] = tensor
            return result
        if parametric and torch.is_grad_enabled():
            if func in self._unrolled:
                result = self._step_by_step(func, args, kwargs)
                if result is not None:
                    return result
            elif func not in self._known and _asks_modes(func):
                with self:
                    return _opened(func)(*args, **kwargs)
            result = self._tapped(func, args, kwargs)
        else:
            result = func(*args, **kwargs)
        self._taint(result)
        if _is_in_place(func):
            self._taint(args[0])
        return result

    def _step_by_step(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self._count += 1
        self._part_of = self._count
        try:
            with self:
                return self._unrolled[func](*args, **kwargs)
        finally:
            self._part_of = None

    def _tapped(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        in_place = _is_in_place(func)
        if in_place and (
            func.__name__ == "__setitem__" or self._is_parametric(args[0])
        ):
            return func(*args, **kwargs)  # stays in the graph: no tap
        bare: dict[int, Tensor] = {}
        sources: dict[int, Tensor] = {}
        data: set[int] = set()
        versions: list[tuple[Tensor, int]] = []

        def stored(tensor: Tensor) -> Tensor:
            copy = tensor.detach()
            if in_place and tensor is args[0]:
                copy = copy.clone()  # the call below writes to it
            if self._is_data(tensor):
                data.add(id(copy))
            if self._is_parametric(tensor):
                bare[id(tensor)] = copy
                sources[id(copy)] = tensor
            versions.append((copy, copy._version))
            return copy

        kept_args, kept_kwargs = map_tensors(stored, args), map_tensors(stored, kwargs)

        def without_parameters(tensor: Tensor) -> Tensor:
            return bare.get(id(tensor), tensor)

        result = func(
            *map_tensors(without_parameters, args),
            **map_tensors(without_parameters, kwargs),
        )
        if not isinstance(result, Tensor) or result.is_complex():
            return func(*args, **kwargs)  # no tap; its parameters stay in the graph
        if not result.is_floating_point():
            return result
        if not result.requires_grad:
            zero = result.new_zeros(()).requires_grad_()
            result = result.add_(zero) if _owns_memory(result) else result + zero
        edge = get_gradient_edge(result)
        own = kept_args, kept_kwargs, sources, frozenset(data)
        self.taps.append(Tap(func, *own, result.shape, edge, versions, self._part_of))
        return result

    def _is_parametric(self, tensor: Tensor) -> bool:
        return self._parametric.get(id(tensor)) is tensor and not self._is_data(tensor)

    def _is_data(self, tensor: Tensor) -> bool:
        reference = self._data.get(id(tensor))
        return reference is not None and reference() is tensor

    def _taint(self, result: Any) -> None:
        for tensor in leaves(result):
            self._data[id(tensor)] = weakref.ref(tensor)
            self.largest = max(self.largest, tensor.numel())


def _owns_memory(tensor: Tensor) -> bool:
    """Whether every element has a place of its own, so that it may be written to."""
    return all(
        stride or size == 1
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _is_in_place(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


_GUARDS = (
    "has_torch_function",
    "has_torch_function_unary",
    "has_torch_function_variadic",
)


def _asks_modes(func: Callable[..., Any]) -> bool:
    """Whether a torch function is Python code that offers itself to modes first."""
    return isinstance(func, FunctionType) and any(
        name in func.__code__.co_names for name in _GUARDS
    )


@cache
def _opened(func: FunctionType) -> FunctionType:
    """The same code, which does not offer itself again but calls what it calls."""
    blind = dict.fromkeys(_GUARDS, lambda *_: False)
    opened = FunctionType(
        func.__code__,
        func.__globals__ | blind,
        func.__name__,
        func.__defaults__,
        func.__closure__,
    )
    opened.__kwdefaults__ = func.__kwdefaults__
    return opened

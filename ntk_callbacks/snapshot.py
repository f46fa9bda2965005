"""Everything of a module tree that a measurement could change, and its way back."""

import operator
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

# What Lightning hangs on a module, which is not the module's own state.
_FOREIGN = {"_trainer", "_fabric"}
# What every module has, and torch or the guard itself looks after.
_REGISTRIES = frozenset(vars(nn.Module()))
_CONTAINERS = (dict, list, tuple, set, deque)
# Most of what modules hold (a dozen registries each), and known to be no records.
_PLAIN = frozenset({*_CONTAINERS, OrderedDict})
_MANY = 10_000  # items of a container beyond which they are not looked into


class Snapshot:
    """Everything of a module tree that a measurement could change."""

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        own = [
            v for part in modules for k, v in vars(part).items() if k not in _FOREIGN
        ]
        held = list(_reachable(own))
        others = [value for value in held if type(value) not in _PLAIN]
        records = [value for value in others if _is_record(value)]
        self._training = [(part, part.training) for part in modules]
        self._attributes = [
            (owner, dict(vars(owner))) for owner in [*modules, *records]
        ]
        self._containers = [
            (value, contents_of(value))
            for value in held
            if isinstance(value, dict | list | set | deque)
        ]
        self._states = [state for value in others if (state := generator_state(value))]
        self._arrays = [(value, value.copy()) for value in others if _is_array(value)]
        tensors = [*module.parameters(), *module.buffers()]
        tensors += [value for value in others if isinstance(value, Tensor)]
        tensors = list({id(tensor): tensor for tensor in tensors}.values())
        self._gradients = [
            (tensor, tensor.requires_grad, tensor.grad)
            for tensor in tensors
            if tensor.is_leaf
        ]
        kept = [
            tensor
            for tensor in tensors
            # Comparing a sharded tensor would wait for other processes; measurements
            # refuse them. Sparse ones cannot be compared.
            if not is_lazy(tensor)
            and "DTensor" not in type(tensor).__name__
            and tensor.layout == torch.strided
        ]
        self._tensors = [
            (tensor, tensor.data, tensor.detach().clone()) for tensor in kept
        ]
        for tensor, _, _ in self._gradients:
            tensor.grad = None

    def restore(self) -> None:
        """Put everything back, in place."""
        for part, attributes in self._attributes:
            current = vars(part)
            for name in current.keys() - attributes.keys():
                del current[name]
            for name, value in attributes.items():
                if current.get(name, _ABSENT) is not value:
                    current[name] = value
        for container, contents in self._containers:
            refill(container, contents)
        for part, training in self._training:
            if part.training != training:
                part.training = training
        for tensor, storage, saved in self._tensors:
            if _layout(tensor) != _layout(storage):
                tensor.data = storage
            # Through `.data`, so that a graph the user still holds stays valid.
            if not saved.is_meta and not torch.equal(storage, saved):
                storage.copy_(saved)
        for restore_generator in self._states:
            restore_generator()
        for array, values in self._arrays:
            if array.flags.writeable:
                array[...] = values
        for tensor, requires_grad, grad in self._gradients:
            if tensor.requires_grad != requires_grad:
                tensor.requires_grad_(requires_grad)
            tensor.grad = grad


class Attributes:
    """What the modules of a tree hold by name; the numbers of tensors are not kept."""

    def __init__(self, module: nn.Module) -> None:
        everything = [vars(part) for part in module.modules()]
        self._owners = [
            (names, len(names), {k: names[k] for k in names.keys() - _REGISTRIES})
            for names in everything
        ]
        self._containers = [
            (value, contents_of(value))
            for _, _, own in self._owners
            for value in own.values()
            if isinstance(value, dict | list | set | deque) and len(value) <= _MANY
        ]

    def restore(self) -> None:
        """Put everything back, in place."""
        for names, count, own in self._owners:
            for name, value in own.items():
                if names.get(name, _ABSENT) is not value:
                    names[name] = value
            if len(names) > count:
                for name in names.keys() - own.keys() - _REGISTRIES:
                    del names[name]
        for container, contents in self._containers:
            refill(container, contents)


def generator_state(value: Any) -> Callable[[], Any] | None:
    """How to bring a random generator back to its present state.

    Args:
        value: Anything.

    Returns:
        A function that restores the state; None if `value` is no generator of torch,
        NumPy or Python.
    """
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if type(value).__module__.startswith("numpy.random"):
        if hasattr(value, "bit_generator"):
            state = value.bit_generator.state
            return partial(setattr, value.bit_generator, "state", state)
        if hasattr(value, "set_state"):
            return partial(value.set_state, value.get_state())
    return None


def _reachable(values: list[Any]) -> Iterator[Any]:
    """The values, and what containers and plain records among them hold, each once."""
    waiting, seen = list(values), set[int]()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        if type(value) not in _PLAIN and _is_record(value):
            waiting.extend(vars(value).values())
        elif isinstance(value, _CONTAINERS) and len(value) <= _MANY:
            waiting.extend(value.values() if isinstance(value, dict) else value)


def _is_record(value: Any) -> bool:
    """Objects that are data alone; others may belong to a thread or a connection."""
    record = isinstance(value, SimpleNamespace) or is_dataclass(value)
    return record and not isinstance(value, type) and hasattr(value, "__dict__")


def _is_array(value: Any) -> bool:
    return type(value).__module__ == "numpy" and type(value).__name__ == "ndarray"


_ABSENT = object()


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def contents_of(container: Any) -> list[Any]:
    """The items of a container; of a dict, keys and values by turns."""
    if isinstance(container, dict):
        return [part for pair in container.items() for part in pair]
    return list(container)


def refill(container: Any, contents: list[Any]) -> list[Any]:
    """Give a container its former contents without replacing it.

    Args:
        container: A dict, list, set or deque.
        contents: What `contents_of` gave.

    Returns:
        What it held instead; empty if nothing had changed.
    """
    found = contents_of(container)
    if len(found) == len(contents) and all(map(operator.is_, found, contents)):
        return []
    container.clear()
    if isinstance(container, dict):
        for key, value in zip(contents[::2], contents[1::2], strict=True):
            container[key] = value
    elif isinstance(container, set):
        container.update(contents)
    else:
        container.extend(contents)
    return found

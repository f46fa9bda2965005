"""A device that is not the CPU, on any machine: like a GPU, but for its speed.

Its tensors hold tensors of the CPU, so that values are real; operators refuse to mix
both kinds, as those of a GPU do, and what goes back to the CPU is noted. torch lets one
process register one such device for good: use it in a process of its own.
"""

import sys
from collections import Counter
from contextlib import contextmanager

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
_MOVING = {aten._to_copy.default, aten.copy_.default}
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}

moved: Counter = Counter()
"""Module of the package -> most numbers that it took to the CPU at once."""


class _Backend(backend_registration._DummyBackendModule):
    """What torch asks the module of a device."""

    def get_rng_state(self, device=None):
        return torch.zeros(1, dtype=torch.uint8)

    def set_rng_state(self, state, device=None):
        pass

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


DEVICE = torch.device("privateuseone", 0)


class Far(torch.Tensor):
    """A tensor of the device around one of the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near):
        far = torch.Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=DEVICE,
        )
        far.near = near
        return far

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return _run(operator, args, kwargs or {})

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            twin = Far(self.near.clone())
            if isinstance(self, nn.Parameter):
                twin = nn.Parameter(twin)
            memo[id(self)] = twin.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def data_ptr(self):
        return self.near.data_ptr()

    def untyped_storage(self):
        return self.near.untyped_storage()

    def tolist(self):
        return self.near.tolist()


def _run(operator, args, kwargs):
    values = tree_leaves((args, kwargs))
    far = [v for v in values if isinstance(v, Far)]
    near = [v for v in values if isinstance(v, torch.Tensor) and not isinstance(v, Far)]
    indexing = operator in _INDEXING and isinstance(args[0], Far)
    if far and any(v.ndim for v in near) and not (indexing or operator in _MOVING):
        raise RuntimeError(f"{operator} of tensors on {DEVICE} and on the CPU")
    device = kwargs.get("device")
    outward = bool(far) if device is None else torch.device(device).type == DEVICE.type
    if device is not None:
        if outward and kwargs.get("generator") is not None:
            raise RuntimeError(f"{operator} on {DEVICE} with a generator of the CPU")
        kwargs = kwargs | {"device": torch.device("cpu")}
    if far and (not outward or (operator in _MOVING and args[0] is not far[0])):
        _note(far[0])
    found = operator(*tree_map(_unwrapped, args), **tree_map(_unwrapped, kwargs))
    # What is changed in place stays what it was.
    known = {id(v.near): v for v in far} | {id(v): v for v in near}

    def wrapped(value):
        if not isinstance(value, torch.Tensor) or isinstance(value, Far):
            return value
        return known[id(value)] if id(value) in known else Far(value)

    return tree_map(wrapped, found) if outward else found


def _unwrapped(value):
    return value.near if isinstance(value, Far) else value


def _note(tensor):
    frame = sys._getframe()
    while frame and not frame.f_globals.get("__name__", "").startswith("ntk_callbacks"):
        frame = frame.f_back
    if frame:
        module = frame.f_globals["__name__"]
        moved[module] = max(moved[module], tensor.numel())


class _Operators(TorchDispatchMode):
    """Operators that are given no tensor of the device, but make one."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return _run(operator, args, kwargs or {})


class _Lists(TorchFunctionMode):
    """Lists that become tensors of the device in C++, where no operator is seen."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if function in (torch.tensor, torch.as_tensor) and device is not None:
            return function(*args, **kwargs | {"device": "cpu"}).to(device)
        if function is torch.Tensor.new_tensor and isinstance(args[0], Far):
            return torch.tensor(args[1], dtype=args[0].dtype).to(DEVICE)
        if function is torch.Tensor.__getitem__ and isinstance(args[1], list):
            args = args[0], torch.tensor(args[1]).to(args[0].device)
        return function(*args, **kwargs)


def register():
    """Make the device known, before anything is differentiated in this process."""
    backend_registration._setup_privateuseone_for_python_backend("pretend", _Backend())


@contextmanager
def pretended():
    """The device is there."""
    with _Operators(), _Lists():
        yield


def far(model):
    """The model on the device; `model.to(DEVICE)` cannot move a parameter there."""
    known = {}
    for module in model.modules():
        for owned in (module._parameters, module._buffers):
            for name, tensor in owned.items():
                if tensor is not None and id(tensor) not in known:
                    twin = Far(tensor.detach().clone())
                    if isinstance(tensor, nn.Parameter):
                        twin = nn.Parameter(twin, tensor.requires_grad)
                    known[id(tensor)] = twin
                owned[name] = known.get(id(tensor))
    return model

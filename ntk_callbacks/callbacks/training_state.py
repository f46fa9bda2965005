"""All that makes up a training run between two hooks, as texts that can be compared."""

import hashlib
import random
import sys
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

# What Lightning hangs on a module, or renames from hook to hook.
_LIGHTNING = {"_trainer", "_fabric", "_current_fx_name", "training"}
_REGISTRIES = {"_parameters", "_buffers", "_modules"}
_MANY = 1000  # items of a container beyond which only their number is compared


def training_state(trainer: Any, pl_module: nn.Module) -> dict[str, str]:
    """What is so at this moment of a run: name of each part -> text or fingerprint.

    Fingerprints tell tensors apart bit by bit. Reads only; draws no random number.

    Args:
        trainer: The trainer, inside `fit`.
        pl_module: Its module.

    Returns:
        First what tends to be a cause (flags, hooks, generators), then what it leads to
        (buffers, gradients, weights, the state of the optimizers).
    """
    found = {
        **dict(_settings()),
        **dict(_structure(pl_module)),
        **dict(_generators()),
    }
    for kind, tensors in (
        ("buffer", pl_module.named_buffers()),
        ("parameter", pl_module.named_parameters()),
    ):
        found |= {f"{kind} {name!r}": fingerprint(tensor) for name, tensor in tensors}
    for name, parameter in pl_module.named_parameters():
        found[f"requires_grad of {name!r}"] = str(parameter.requires_grad)
        found[f"gradient of {name!r}"] = fingerprint(parameter.grad)
        hooks = len(parameter._backward_hooks or ())
        hooks += len(getattr(parameter, "_post_accumulate_grad_hooks", None) or ())
        found[f"number of gradient hooks on {name!r}"] = str(hooks)
    found |= dict(_optimizers(trainer, pl_module))
    found["completed updates"] = str(trainer.global_step)
    found["epoch"] = str(trainer.current_epoch)
    found["wish to stop"] = str(trainer.should_stop)
    return found


def fingerprint(value: Any) -> str:
    """A text that equal values share, in any process of this machine.

    Args:
        value: A tensor, array, generator, number or text, or containers of these.

    Returns:
        For tensors dtype, shape, norm and a hash of the bytes; for objects of other
        classes the name of the class alone.
    """
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if isinstance(value, random.Random):
        return _hash(repr(value.getstate()).encode())
    if isinstance(value, torch.Generator):
        return _of_tensor(value.get_state())
    if type(value).__module__.startswith("numpy"):
        state = getattr(getattr(value, "bit_generator", None), "state", value)
        return repr(state)
    if isinstance(value, Mapping | list | tuple | deque | set | frozenset):
        kind = type(value).__name__
        if len(value) > _MANY:
            return f"{kind} of {len(value)}"
        if isinstance(value, Mapping):
            pairs = (f"{fingerprint(k)}: {fingerprint(v)}" for k, v in value.items())
            return f"{kind}({', '.join(pairs)})"
        return f"{kind}({', '.join(fingerprint(part) for part in value)})"
    if value is None or isinstance(value, bool | int | float | complex | str):
        return repr(value)
    return type(value).__name__


def _of_tensor(tensor: Tensor) -> str:
    if is_lazy(tensor):
        return "without a shape yet"
    kind = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
        return f"{tensor.layout} {tensor.device.type} {kind}"
    held = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    data = held.reshape(-1).view(torch.uint8).numpy().tobytes()
    number = held.is_floating_point() or held.is_complex()
    norm = f" of norm {float(held.abs().double().norm()):.9g}" if number else ""
    return f"{kind}{norm} [{_hash(data)}]"


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=6).hexdigest()


def _settings() -> Iterator[tuple[str, str]]:
    """Flags of the process."""
    cudnn = torch.backends.cudnn
    yield from {
        "default dtype": str(torch.get_default_dtype()),
        "gradient mode": str(torch.is_grad_enabled()),
        "inference mode": str(torch.is_inference_mode_enabled()),
        "autocast": str(torch.is_autocast_enabled("cpu")),
        "anomaly detection": str(torch.is_anomaly_enabled()),
        "deterministic algorithms": str(torch.are_deterministic_algorithms_enabled()),
        "float32 precision of products": torch.get_float32_matmul_precision(),
        "cuDNN flags": str((cudnn.enabled, cudnn.benchmark, cudnn.deterministic)),
        "number of threads": str(torch.get_num_threads()),
        "warning filters": _hash(repr(warnings.filters).encode()),
    }.items()


def _structure(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Flags, hooks and attributes of every module."""
    for path, module in model.named_modules():
        name = repr(path or type(model).__name__)
        yield f"training flag of {name}", str(module.training)
        for attribute, value in sorted(vars(module).items()):
            if attribute in _LIGHTNING | _REGISTRIES:
                continue
            if attribute.endswith("_hooks"):
                text = f"{attribute.strip('_').replace('_', ' ')} on {name}"
                yield f"number of {text}", str(len(value or ()))
            else:
                yield f"attribute {attribute!r} of {name}", fingerprint(value)


def _generators() -> Iterator[tuple[str, str]]:
    yield "random generator of Python", _hash(repr(random.getstate()).encode())
    numpy = sys.modules.get("numpy.random")
    if numpy is not None:
        _, keys, *rest = numpy.get_state()
        text = f"{keys.tolist()} {rest}"
        yield "random generator of NumPy", _hash(text.encode())
    yield "random generator of torch", _of_tensor(torch.get_rng_state())
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            yield f"random generator of cuda:{index}", _of_tensor(state)


def _optimizers(trainer: Any, model: nn.Module) -> Iterator[tuple[str, str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for index, optimizer in enumerate(trainer.optimizers):
        which = f"optimizer {index}"
        hooks = (v for k, v in vars(optimizer).items() if k.endswith("_hooks"))
        yield f"number of hooks on {which}", str(sum(len(found) for found in hooks))
        for number, group in enumerate(optimizer.param_groups):
            settings = {k: v for k, v in group.items() if k != "params"}
            yield f"settings of group {number} of {which}", fingerprint(settings)
            for parameter in group["params"]:
                name = names.get(id(parameter), "a parameter outside of the module")
                state = optimizer.state.get(parameter)
                yield f"state of {which} for {name!r}", fingerprint(state)
    for index, held in enumerate(trainer.lr_scheduler_configs):
        count = getattr(held.scheduler, "last_epoch", None)
        yield f"count of learning-rate scheduler {index}", fingerprint(count)
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None:
        yield "scale of the gradients", repr(scaler.get_scale())

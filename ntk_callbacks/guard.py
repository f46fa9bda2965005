"""The guard: what happens inside leaves no trace on a model, a generator or a flag."""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ntk_callbacks._types import Mode
from ntk_callbacks.errors import UnsupportedModelError
from ntk_callbacks.snapshot import Snapshot

# In "train" mode these stay in evaluation mode: the kernel is that of the mean network.
_STOCHASTIC = (
    nn.modules.dropout._DropoutNd,
    nn.RNNBase,
    nn.MultiheadAttention,
    nn.RReLU,
)
# Modules around a user's module, and the name under which they hold it.
_WRAPPERS = {"_FabricModule": "_original_module", "DistributedDataParallel": "module"}


@contextmanager
def quietly(module: nn.Module, *, precise: bool = True) -> Iterator[None]:
    """Run a measurement on `module` and put everything back, on exceptions too.

    Restored bit for bit: parameters and buffers; `.grad` (hidden inside, so that a
    `backward` cannot add to a half-accumulated gradient); `requires_grad`; the
    `training` flag, hooks and other attributes of every submodule, with the tensors,
    arrays, random generators, containers and dataclasses that they hold; the global
    generators of Python, NumPy, torch and the module's devices; default dtype and
    backend flags. Inside, gradients are enabled, autocast, inference mode and anomaly
    detection are off, and float32 products are taken in float32: TF32 and other
    shortened formats are off.

    Not restored: what the module's code keeps elsewhere (files, global variables), and
    what objects of other classes that it holds keep to themselves (iterators, files).
    Costs one copy of the parameters and buffers while it is open.

    Args:
        module: The module that is about to be measured.
        precise: False leaves float32 products as the flags of the process have them.

    Yields:
        Nothing.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train()
        >>> before = torch.get_rng_state()
        >>> with quietly(net):
        ...     net.eval()(torch.randn(3, 2)).sum().backward()
        >>> net.training, net[0].weight.grad, torch.equal(before, torch.get_rng_state())
        (True, None, True)
    """
    tensors = [*module.parameters(), *module.buffers()]
    devices = {tensor.device for tensor in tensors if tensor.device.type != "meta"}
    with ExitStack() as stack:
        stack.enter_context(isolated_rng(devices))
        stack.enter_context(_flags_kept(precise))
        stack.enter_context(torch.inference_mode(False))
        # It would tell of passes that are meant to fail, and refuse what is NaN.
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        snapshot = Snapshot(module)
        stack.callback(snapshot.restore)
        stack.enter_context(torch.enable_grad())
        for kind in {"cpu"} | {device.type for device in devices}:
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def measuring(model: nn.Module, mode: Mode) -> Iterator[None]:
    """The state a model is measured in; `quietly` puts everything back afterwards.

    `"eval"` is `model.eval()`. `"train"` keeps the flags of a model that is training
    (frozen layers stay frozen), trains all of one that is not, and holds dropout still.
    Compiled modules run their eager code, so that no recompilation counts against them;
    wrappers of Fabric, accelerate and DistributedDataParallel are passed by, with their
    autocast and their waiting for other processes.

    Args:
        model: The module that is about to be measured.
        mode: `"eval"` or `"train"`.

    Yields:
        Nothing.

    Raises:
        UnsupportedModelError: If SyncBatchNorm would wait for other processes, or the
            mode of the model is fixed.
    """
    with quietly(model), eagerly():
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            # cuDNN differentiates recurrent layers in training mode only.
            torch.backends.cudnn.enabled = False
        _pass_wrappers_by(model)
        if mode == "eval":
            _switch(model.eval)
        else:
            if not model.training:
                _switch(model.train)
            for module in model.modules():
                if isinstance(module, _STOCHASTIC):
                    module.eval()
            _refuse_collectives(model)
        yield


def eagerly() -> AbstractContextManager[None]:
    """Compiled modules run their eager code inside."""
    # Where nothing was compiled the compiler is not loaded, and loading takes seconds.
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def _switch(to: Callable[[], object]) -> None:
    try:
        to()
    except NotImplementedError as error:  # of programs made by `torch.export`
        raise UnsupportedModelError(
            f"the mode of the model cannot be changed ({error}). Measure the module it "
            "was made from."
        ) from error


def _pass_wrappers_by(model: nn.Module) -> None:
    """`forward` as the user wrote it; the guard puts back what others made of it."""
    for module in model.modules():
        held = _WRAPPERS.get(type(module).__name__)
        wrapped = module._modules.get(held) if held else None  # it may have two names
        if wrapped is not None:
            vars(module)["forward"] = wrapped.__call__
        elif "_original_forward" in vars(module):  # accelerate's mixed precision
            vars(module)["forward"] = vars(module)["_original_forward"]


def _refuse_collectives(model: nn.Module) -> None:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm) and distributed.get_world_size() > 1:
            raise UnsupportedModelError(
                f'mode="train": {name!r} is a SyncBatchNorm, whose statistics need '
                "every process, but measurements run on one. Measure with "
                'mode="eval".'
            )


@contextmanager
def isolated_rng(
    devices: set[torch.device] | None = None, seed: int | None = None
) -> Iterator[None]:
    """Restore the generators of Python, NumPy, torch and the given devices on exit.

    With a seed, those of Python, NumPy and torch on the CPU start from it.
    """
    python = random.getstate()
    numpy = sys.modules.get("numpy.random")
    numpy_state = numpy.get_state() if numpy is not None else None
    cpu = torch.get_rng_state()
    accelerators = {
        device: torch.get_device_module(device).get_rng_state(device)
        for device in devices or ()
        if hasattr(torch.get_device_module(device), "get_rng_state")
        and device.type not in ("cpu", "mps")
    }
    mps = any(device.type == "mps" for device in devices or ())
    mps_state = torch.mps.get_rng_state() if mps else None
    try:
        if seed is not None:
            random.seed(seed)
            torch.default_generator.manual_seed(seed)
            if numpy is not None:
                numpy.seed(seed)
        yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.set_state(numpy_state)
        torch.set_rng_state(cpu)
        for device, state in accelerators.items():
            torch.get_device_module(device).set_rng_state(state, device)
        if mps_state is not None:
            torch.mps.set_rng_state(mps_state)


@contextmanager
def _flags_kept(precise: bool) -> Iterator[None]:
    """Full float32 precision inside; every process-wide numerical setting restored."""
    dtype = torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn
    cudnn_flags = cudnn.enabled, cudnn.benchmark, cudnn.deterministic
    try:
        with _ieee_float32() if precise else nullcontext():
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic = cudnn_flags


@contextmanager
def _ieee_float32() -> Iterator[None]:
    backends: Any = torch.backends  # the stubs do not know every operator
    operators = []
    if hasattr(backends.cuda.matmul, "fp32_precision"):  # torch >= 2.9
        mkldnn = backends.mkldnn
        operators = [
            *(backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn),
            *(mkldnn.matmul, mkldnn.conv, mkldnn.rnn),
        ]
    # Both the older switches and the newer ones, because reading one of them raises
    # when they contradict each other. One that cannot be read could not be put back.
    products = _read(torch.get_float32_matmul_precision)
    convolutions = _read(lambda: backends.cudnn.allow_tf32)
    saved = [operator.fp32_precision for operator in operators]
    try:
        if products is not None:
            torch.set_float32_matmul_precision("highest")
        if convolutions is not None:
            backends.cudnn.allow_tf32 = False
        for operator in operators:
            operator.fp32_precision = "ieee"
        yield
    finally:
        if products is not None:
            torch.set_float32_matmul_precision(products)
        if convolutions is not None:
            backends.cudnn.allow_tf32 = convolutions
        for operator, precision in zip(operators, saved, strict=True):
            operator.fp32_precision = precision


def _read(switch: Callable[[], Any]) -> Any:
    try:
        return switch()
    except RuntimeError:  # contradicts the newer switches; those decide
        return None

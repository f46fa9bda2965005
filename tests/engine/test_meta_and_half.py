"""Kernels without numbers, and kernels in another precision than the model's."""

import copy
from contextlib import contextmanager, nullcontext

import pytest
import torch
from cases import BY_ID, each, in_double
from networks import (
    Computed,
    convolution,
    embedding,
    images,
    language_model,
    mlp,
    resnet,
    sequences,
    tokens,
    transformer,
    vectors,
)
from oracles import ntk_by_loop, relative_error
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from ntk_callbacks import empirical_ntk, plan_ntk

SHAPES = {
    "full": lambda n1, n2, c: (n1, n2, c, c),
    "trace": lambda n1, n2, c: (n1, n2),
    "diagonal": lambda n1, n2, c: (n1, n2, c),
    "pseudo": lambda n1, n2, c: (n1, n2),
}


# Tensors without numbers.


def sequence_first():
    return Computed(
        lambda self, x: self.head(torch.tanh(self.stem(x.transpose(0, 1)))[0]),
        stem=nn.Linear(6, 6),
        head=nn.Linear(6, 2),
    )


META = {
    "mlp": (mlp, vectors, 2),
    "cnn": (lambda: convolution(nn.GroupNorm(2, 4), nn.ReLU()), images, 2),
    "resnet": (resnet, images, 2),
    "transformer": (transformer, sequences, 2),
    "sequence_first": (sequence_first, sequences, 2),
    "embedding": (embedding, tokens, 2),
    "tied": (language_model, tokens, 7),
}


def on_meta(name, n=3):
    factory, probe, c = META[name]
    return factory().to("meta").eval(), probe(n).to("meta"), c


class Allocations(TorchDispatchMode):
    """The largest tensor with numbers that an operator gives."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.largest = max(self.largest, tensor.numel())
        return result


# At most the state of a random generator, which is saved and put back.
STATE = len(torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        *((name, o) for name in ("mlp", "cnn", "transformer") for o in SHAPES),
        *((name, "full") for name in ("resnet", "sequence_first", "embedding", "tied")),
    ],
)
def test_shapes_on_the_meta_device(name, outputs):
    model, x, c = on_meta(name)
    with Allocations() as real:
        ntk = empirical_ntk(model, x, outputs=outputs)
    assert real.largest <= STATE
    assert ntk.is_meta
    assert ntk.dtype == torch.float32
    assert ntk.shape == SHAPES[outputs](3, 3, c)


@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer"])
def test_shapes_of_cross_kernels_in_parts_on_the_meta_device(name):
    model, x, c = on_meta(name)
    parts = empirical_ntk(model, x, x[:2], by="module")
    assert len(parts) > 1
    for part in parts.values():
        assert part.is_meta
        assert part.shape == (3, 2, c, c)


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet"])
def test_a_plan_on_the_meta_device_is_carried_out(name, fast_only):
    """It says that everything is fast, and so it is."""
    model, x, c = on_meta(name)
    plan = plan_ntk(model, x)
    assert plan.coverage == 1.0
    assert empirical_ntk(model, x, route=plan).shape == (3, 3, c, c)


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet"])
def test_a_plan_on_the_meta_device_is_that_of_the_numbers(name):
    """What a kernel will cost is known before there are weights."""
    model, x, _ = on_meta(name)
    meta = plan_ntk(model, x, memory_budget="1GiB")
    factory, probe, _ = META[name]
    real = plan_ntk(factory().eval(), probe(), memory_budget="1GiB")
    assert meta.flops == real.flops
    assert {t.name: t.route for t in meta.terms} == {
        t.name: t.route for t in real.terms
    }
    assert str(meta) == str(real)


@pytest.mark.parametrize("shaped", [False, True])
def test_a_scaling_on_the_meta_device(shaped, fast_only):
    model, x, c = on_meta("mlp")
    scaling = {
        name: torch.rand_like(p) if shaped else 0.5
        for name, p in model.named_parameters()
    }
    ntk = empirical_ntk(model, x, scaling=scaling)
    assert ntk.shape == (3, 3, c, c)


def test_a_model_that_no_machine_could_hold(fast_only):
    """Ten billion numbers: 40 GB."""
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Linear(100_000, 100_000, bias=False), nn.Linear(100_000, 2)
        )
        x = torch.randn(3, 100_000)
    plan = plan_ntk(model, x, memory_budget="1TiB")
    assert "10,000,200,002 parameters" in str(plan)
    assert empirical_ntk(model, x, route=plan).shape == (3, 3, 2, 2)


# Half precision.


HALF = {
    "mlp": (mlp, vectors),
    "cnn": (lambda: convolution(nn.GroupNorm(2, 4), nn.ReLU()), images),
    "transformer": (transformer, sequences),
    "embedding": (embedding, tokens),
}


@pytest.mark.parametrize(
    ("name", "dtype", "outputs"),
    [
        *((name, torch.float16, "full") for name in HALF),
        *((name, torch.bfloat16, "full") for name in HALF),
        ("cnn", torch.bfloat16, "trace"),
        ("transformer", torch.float16, "trace"),
    ],
)
def test_half_precision_models_take_fast_routes_in_float32(
    name, dtype, outputs, fast_only, caplog
):
    factory, probe = HALF[name]
    model, x = factory().to(dtype).eval(), probe()
    plan = plan_ntk(model, x, outputs=outputs)
    assert plan.coverage == 1.0
    assert plan.itemsize == 4
    ntk = empirical_ntk(model, x, outputs=outputs, route=plan)
    assert ntk.dtype == torch.float32
    assert not caplog.records
    # The same rounded weights in float64; the rest is the round-off of float32, which
    # is far below that of the weights (1e-3, 1e-2).
    full = ntk_by_loop(copy.deepcopy(model).double(), each(in_double, x))
    right = full if outputs == "full" else full.diagonal(dim1=2, dim2=3).mean(-1)
    assert relative_error(ntk.double(), right) < 1e-5
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs(dtype, fast_only):
    model, x = mlp().to(dtype), vectors().to(dtype)
    ntk = empirical_ntk(model, x)
    expected = ntk_by_loop(copy.deepcopy(model).double(), x.double())
    assert relative_error(ntk.double(), expected) < 1e-5


def test_a_model_that_turns_to_half_precision_inside_is_right():
    """Its own rounding stays, and no rule may hide it."""
    model = Computed(
        lambda self, x: self.head(
            functional.linear(
                self.stem(x).tanh().bfloat16(), self.middle.weight.bfloat16()
            ).float()
        ),
        stem=nn.Linear(5, 6),
        middle=nn.Linear(6, 6, bias=False),
        head=nn.Linear(6, 2),
    )
    x = vectors()
    ntk = empirical_ntk(model, x)
    # bfloat16 has 8 bits: gradients that pass it are off by some 1/256.
    assert relative_error(ntk, ntk_by_loop(model, x)) < 1e-2


# Single precision.


@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        *(
            (name, "full")
            for name in ("mlp", "conv_transpose", "group_norm", "embedding")
        ),
        *(
            (name, outputs)
            for name in ("cnn", "attention")
            for outputs in ("full", "trace", "diagonal")
        ),
    ],
)
def test_fast_routes_in_single_precision(name, outputs, fast_only):
    model, x = BY_ID[name].build()
    full = ntk_by_loop(model, x)
    single = model.float()
    x = each(lambda t: t.float() if t.is_floating_point() else t, x)
    plan = plan_ntk(single, x, outputs=outputs)
    assert plan.coverage == 1.0
    ntk = empirical_ntk(single, x, outputs=outputs, route=plan)
    assert ntk.dtype == torch.float32
    diagonal = full.diagonal(dim1=2, dim2=3)
    right = {"full": full, "trace": diagonal.mean(-1), "diagonal": diagonal}[outputs]
    # Off by the rounding of the weights and of some hundred sums, ε = 1.2e-7.
    assert relative_error(ntk.double(), right) < 1e-5


def test_a_wide_layer_in_single_precision(fast_only):
    """Sums of thousands of terms: errors add up as their square root."""
    model = nn.Sequential(nn.Linear(1000, 2000), nn.ReLU(), nn.Linear(2000, 3))
    x = torch.randn(6, 1000)
    ntk = empirical_ntk(model, x)
    expected = empirical_ntk(copy.deepcopy(model).double(), x.double())
    assert relative_error(ntk.double(), expected) < 1e-5


# Flags of precision.


@contextmanager
def flags(precision, cudnn):
    """Process-wide flags as a user may have set them."""
    backends = torch.backends
    before = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(precision)
    backends.cudnn.allow_tf32 = cudnn
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        backends.cudnn.allow_tf32 = before[1]


def state():
    backends = torch.backends
    return (
        torch.get_float32_matmul_precision(),
        backends.cuda.matmul.allow_tf32,
        backends.cudnn.allow_tf32,
        backends.cudnn.enabled,
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
    )


def watching(seen, raises):
    """An output function that notes the flags, forwards and backwards."""

    def output_fn(model, x):
        seen.add(state())
        if raises:
            raise ZeroDivisionError
        y = model(x)
        if y.requires_grad:
            y.register_hook(lambda gradient: seen.add(state()))
        return y

    return output_fn


@pytest.mark.parametrize(
    ("precision", "cudnn", "call", "raises"),
    [
        ("highest", True, empirical_ntk, False),
        ("high", True, empirical_ntk, False),
        ("medium", False, empirical_ntk, False),
        ("medium", True, empirical_ntk, True),
        ("medium", True, plan_ntk, False),
        ("high", False, plan_ntk, True),
    ],
)
def test_precision_is_full_inside_and_as_before_afterwards(
    precision, cudnn, call, raises
):
    seen = set()
    error = pytest.raises(ZeroDivisionError) if raises else nullcontext()
    with flags(precision, cudnn):
        before = state()
        with torch.autocast("cpu", dtype=torch.bfloat16), error:
            call(mlp(), vectors(), output_fn=watching(seen, raises))
        assert state() == before
    ((products, tf32, convolutions, _, dtype, autocast),) = seen
    assert products == "highest"
    assert not tf32
    assert not convolutions
    assert not autocast
    assert dtype == torch.float32

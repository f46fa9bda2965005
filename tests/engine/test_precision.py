"""Kernels in another precision than the model's, and the flags of precision."""

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
    mlp,
    sequences,
    tokens,
    transformer,
    vectors,
)
from oracles import ntk_by_loop, relative_error
from torch import nn
from torch.nn import functional

from ntk_callbacks import empirical_ntk, plan_ntk

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

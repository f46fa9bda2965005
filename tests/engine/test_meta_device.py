"""Kernels without numbers: shapes and plans on the meta device."""

import pytest
import torch
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
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ntk_callbacks import empirical_ntk, plan_ntk

SHAPES = {
    "full": lambda n1, n2, c: (n1, n2, c, c),
    "trace": lambda n1, n2, c: (n1, n2),
    "diagonal": lambda n1, n2, c: (n1, n2, c),
    "pseudo": lambda n1, n2, c: (n1, n2),
}


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

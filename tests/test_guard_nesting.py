"""`quietly` under exceptions, nested, and around modules with state of their own."""

# ruff: noqa: NPY002 (the legacy generator of NumPy is what data sets draw from)
import contextlib
import random

import guarded
import numpy.random
import pytest
import torch
from cases import BY_ID
from guarded import assert_bits, bits
from torch import nn

from ntk_callbacks import empirical_ntk, input_jacobian, quietly

model = guarded.model


def everything(model):
    """All the harm of the other tests."""
    model.eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
        model.seen += 1
    model.head.weight.data = torch.zeros(1)
    model.calls = 99
    model.head.register_forward_hook(lambda *_: None)
    torch.rand(3)
    random.random()
    numpy.random.rand()


@pytest.mark.parametrize(
    "context",
    [contextlib.nullcontext, torch.no_grad, torch.inference_mode],
    ids=["plain", "no_grad", "inference_mode"],
)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, None])
def test_restored_after_an_exception_and_in_every_gradient_mode(model, context, error):
    before, state = bits(model), torch.get_rng_state()
    python, legacy = random.getstate(), numpy.random.get_state()[1].copy()
    expected = pytest.raises(error) if error else contextlib.nullcontext()
    with expected, context(), quietly(model):
        everything(model)
        if error:
            raise error
    assert_bits(model, before)
    assert all(part.training for part in model.modules())
    assert model.calls == 0
    assert not model.head._forward_hooks
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    assert (numpy.random.get_state()[1] == legacy).all()
    assert torch.is_grad_enabled()


def test_nested(model):
    before = bits(model)
    with quietly(model):
        with quietly(model):
            everything(model)
        assert_bits(model, before)
        everything(model)
    assert_bits(model, before)
    assert model.training


def test_only_a_part_of_a_model(model):
    before = bits(model.head)
    with quietly(model.head), torch.no_grad():
        model.head.weight.zero_()
        model.body[0].weight.zero_()
    assert_bits(model.head, before)
    assert not model.body[0].weight.any()  # not asked for


def test_a_model_without_anything():
    with quietly(nn.Identity()):
        pass


# torch.compile looks at the `.grad` of what enters the compiled part.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    "name", ["spectral_norm", "weight_norm", "lstm", "tied_weights", "compiled_eager"]
)
def test_modules_with_state_of_their_own(name):
    model, x = BY_ID[name].build()
    model.train()
    before = bits(model)
    expected = model(x)
    after_one_call = bits(model)
    model.load_state_dict(before)
    with quietly(model):
        model.eval()
        for p in model.parameters():
            p.data = p.data * 2
        model(x)
    assert_bits(model, before)
    assert torch.equal(model(x), expected)
    assert_bits(model, after_one_call)


def test_optimizers_go_on_as_if_nothing_had_happened():
    """Two runs, one measured after every step: equal to the last bit."""
    final = []
    for measured in (False, True):
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Linear(4, 8),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(8, 2),
        )
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(5):
            x = torch.randn(6, 4)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            if measured:
                empirical_ntk(model, x[:3], mode="train", outputs="trace")
                input_jacobian(model, x[:3])
            optimizer.step()
        final.append(bits(model) | {"draw": torch.rand(3)})
    for name, value in final[0].items():
        assert torch.equal(value, final[1][name]), name


@pytest.mark.parametrize(("layer", "enabled"), [(nn.GRU, False), (nn.Linear, True)])
def test_recurrent_layers_are_measured_without_cudnn(layer, enabled):
    """Promise: cuDNN differentiates them in training mode only, so it is set aside."""
    seen = set()

    def output_fn(model, x):
        seen.add(torch.backends.cudnn.enabled)
        result = model(x)
        return result[0] if isinstance(result, tuple) else result

    x = torch.randn(2, 3, 4)
    empirical_ntk(layer(4, 2), x, output_fn=output_fn, outputs="trace")
    assert seen == {enabled}
    assert torch.backends.cudnn.enabled

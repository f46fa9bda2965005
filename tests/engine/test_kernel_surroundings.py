"""Budgets, precisions and modes around a measurement leave its kernel as it is."""

import copy
import re

import pytest
import torch
from cases import BY_ID
from networks import mlp
from odd_networks import checkpointed
from oracles import TOLERANCE, ntk_by_loop, relative_error

from ntk_callbacks import empirical_ntk
from ntk_callbacks.engine.exact import ROUTES
from ntk_callbacks.errors import MemoryBudgetError

# Memory.


@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        ("mlp", "full"),
        ("mlp", "trace"),
        ("mlp", "diagonal"),
        ("batch_norm_untracked", "full"),
        ("tuple_inputs", "full"),
        ("cnn", "trace"),
    ],
)
@pytest.mark.parametrize("route", ["auto", "rows"])
def test_the_smallest_budget_gives_the_same_kernel(name, outputs, route):
    model, x = BY_ID[name].build()
    arguments = {"outputs": outputs, "route": route}
    whole = empirical_ntk(model, x, **arguments)
    with pytest.raises(MemoryBudgetError) as refused:
        empirical_ntk(model, x, **arguments, memory_budget=1)
    need = re.search(r"at least ([\d.e+-]+) MiB", str(refused.value))
    smallest = int(float(need[1]) * 1.01 * 2**20)  # the message has three digits
    ntk = empirical_ntk(model, x, **arguments, memory_budget=smallest)
    assert relative_error(ntk, whole) < TOLERANCE


@pytest.mark.parametrize("route", ["auto", "rows"])
def test_the_smallest_budget_gives_the_same_cross_kernel_in_parts(net, x, route):
    arguments = {"x2": x[:3] + 1, "by": "module", "route": route}
    scaling = {name: torch.rand_like(p) for name, p in net.named_parameters()}
    whole = empirical_ntk(net, x, **arguments, scaling=scaling)
    with pytest.raises(MemoryBudgetError) as refused:
        empirical_ntk(net, x, **arguments, memory_budget=1)
    need = float(re.search(r"at least ([\d.e+-]+) MiB", str(refused.value))[1])
    budget = int(need * 1.01 * 2**20)
    parts = empirical_ntk(net, x, **arguments, scaling=scaling, memory_budget=budget)
    assert parts.keys() == whole.keys()
    for name, part in parts.items():
        assert relative_error(part, whole[name]) < TOLERANCE


def test_a_small_budget_on_a_reentrant_checkpoint(x):
    model = checkpointed(True).double()
    budget = 4 * 1024  # several passes over the parameters
    ntk = empirical_ntk(model, x, memory_budget=budget)
    assert relative_error(ntk, ntk_by_loop(model, x)) < TOLERANCE


def test_budget_as_text(net, x):
    expected = empirical_ntk(net, x)
    assert torch.equal(empirical_ntk(net, x, memory_budget="1 GiB"), expected)


# Precision and surroundings.


def test_float32_agrees_with_float64():
    model, x = mlp(), torch.randn(6, 5)
    ntk = empirical_ntk(model, x)
    assert ntk.dtype == torch.float32
    expected = empirical_ntk(copy.deepcopy(model).double(), x.double())
    # Gradients carry a few ε = 1.2e-7, and there is no cancellation to enlarge it.
    assert relative_error(ntk.double(), expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mlp", "resnet", "resnet_train", "attention", "lstm"])
def test_half_precision_models_are_measured_in_float32(name, dtype):
    case = BY_ID[name]
    model, x = case.build()
    model = model.to(dtype)
    ntk = empirical_ntk(model, x.float(), mode=case.mode)
    assert ntk.dtype == torch.float32
    assert next(model.parameters()).dtype == dtype
    # The same rounded weights in float64; the rest is float32 round-off, which the
    # normalizations enlarge.
    expected = ntk_by_loop(model.double(), x)
    assert relative_error(ntk.double(), expected) < 1e-4


def test_inputs_of_another_precision_are_cast(net, x):
    assert torch.equal(
        empirical_ntk(net, x.float()), empirical_ntk(net, x.float().double())
    )


@pytest.mark.parametrize("name", ["mlp", "gru", "resnet_train", "checkpoint_reentrant"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_measured_where_gradients_are_off(name, context):
    case = BY_ID[name]
    model, x = case.build()
    expected = empirical_ntk(model, x, mode=case.mode)
    with context():
        ntk = empirical_ntk(model, x, mode=case.mode)
        inference = empirical_ntk(model, x.clone(), mode=case.mode)
    assert torch.equal(ntk, expected)
    assert torch.equal(inference, expected)
    assert not ntk.is_inference()
    assert not ntk.requires_grad


def test_a_model_that_was_made_in_inference_mode(x):
    with torch.inference_mode():
        model = mlp().double()
    assert relative_error(
        empirical_ntk(model, x, parameters=lambda name, p: True),
        ntk_by_loop(_copied(model), x),
    ) < (TOLERANCE)


def _copied(model):
    fresh = mlp().double()
    with torch.no_grad():
        for p, value in zip(fresh.parameters(), model.parameters(), strict=True):
            p.copy_(value.clone())
    return fresh


def test_measured_under_autocast_as_without(net, x):
    expected = empirical_ntk(net, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(empirical_ntk(net, x), expected)


def test_measured_twice_is_equal_to_the_last_bit(net, x):
    assert torch.equal(empirical_ntk(net, x), empirical_ntk(net, x))


def test_the_inputs_are_left_as_they_were():
    model, x = BY_ID["input_overwritten"].build()
    before = x.clone()
    empirical_ntk(model, x)
    assert torch.equal(x, before)


def test_inputs_that_need_gradients_get_none(net, x):
    x.requires_grad_()
    assert not empirical_ntk(net, x).requires_grad
    assert x.grad is None


def test_nan_weights_give_nan_not_an_error(net, x):
    with torch.no_grad():
        net[0].weight[0, 0] = torch.nan
    for route in ["auto", *ROUTES]:
        assert empirical_ntk(net, x, route=route).isnan().any()

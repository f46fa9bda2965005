"""Which parameters a kernel is of, its split into parts, and their scaling."""

import re

import pytest
import torch
from cases import BY_ID
from odd_networks import checkpointed
from oracles import TOLERANCE, ntk_by_loop, relative_error
from torch import nn

from ntk_callbacks import as_matrix, empirical_ntk
from ntk_callbacks.engine.exact import ROUTES


@pytest.mark.parametrize("name", ["mlp", "resnet", "resnet_train", "tied_weights"])
@pytest.mark.parametrize(
    "by", ["module", "parameter", {"a": r"0\.|embed", "b": "bias"}]
)
@pytest.mark.parametrize("outputs", ["full", "trace"])
def test_parts_add_up_to_the_whole(name, by, outputs):
    case = BY_ID[name]
    if by not in ("module", "parameter"):
        by = {"a": by["a"], "b": "bias"} if name == "mlp" else {"a": by["a"]}
    model, x = case.build()
    whole = empirical_ntk(model, x, outputs=outputs, mode=case.mode)
    parts = empirical_ntk(model, x, outputs=outputs, mode=case.mode, by=by)
    assert len(parts) > 1
    assert relative_error(sum(parts.values()), whole) < TOLERANCE


def test_each_part_is_the_kernel_of_its_parameters(net, x):
    parts = empirical_ntk(net, x, by="parameter")
    assert list(parts) == [name for name, _ in net.named_parameters()]
    for name, part in parts.items():
        alone = empirical_ntk(net, x, parameters=rf"^{re.escape(name)}$")
        assert relative_error(part, alone) < TOLERANCE
        assert relative_error(part, ntk_by_loop(net, x, names=[name])) < TOLERANCE


def test_parts_by_module_are_named_after_the_module(net, x):
    net.register_parameter("scale", nn.Parameter(torch.ones(1, dtype=x.dtype)))
    parts = empirical_ntk(net, x, by="module")
    assert list(parts) == ["", "0", "2", "4"]
    assert not parts[""].any()  # nothing uses the parameter at the top


def test_first_matching_pattern_takes_a_parameter_and_rest_the_others(net, x):
    parts = empirical_ntk(net, x, by={"first": r"^0\.", "biases": "bias"})
    expected = {
        "first": ["0.weight", "0.bias"],
        "biases": ["2.bias", "4.bias"],
        "rest": ["2.weight", "4.weight"],
    }
    assert parts.keys() == expected.keys()
    for part, names in expected.items():
        assert relative_error(parts[part], ntk_by_loop(net, x, names=names)) < 1e-10


def test_parameters_by_expression_and_predicate(net, x):
    expected = ntk_by_loop(net, x, names=["0.weight", "2.weight", "4.weight"])
    by_name = empirical_ntk(net, x, parameters="weight")
    by_shape = empirical_ntk(net, x, parameters=lambda name, p: p.ndim == 2)
    assert relative_error(by_name, expected) < TOLERANCE
    assert relative_error(by_shape, expected) < TOLERANCE


@pytest.mark.parametrize("route", ["auto", *ROUTES])
def test_only_a_predicate_reaches_frozen_parameters(net, x, route):
    whole = ntk_by_loop(net, x)
    net[2].requires_grad_(False)
    unfrozen = ntk_by_loop(net, x)
    assert relative_error(empirical_ntk(net, x, route=route), unfrozen) < TOLERANCE
    everything = empirical_ntk(net, x, route=route, parameters=lambda name, p: True)
    assert relative_error(everything, whole) < TOLERANCE


@pytest.mark.parametrize("route", ["auto", "rows"])
@pytest.mark.parametrize("parameters", ["block", "head", "stem"])
def test_some_parameters_of_a_reentrant_checkpoint(x, route, parameters):
    # A reentrant checkpoint silently gives no gradient unless an input needs one.
    plain, reentrant = checkpointed(False).double(), checkpointed(True).double()
    reentrant.load_state_dict(plain.state_dict())
    names = [name for name, _ in plain.named_parameters() if parameters in name]
    ntk = empirical_ntk(reentrant, x, parameters=parameters, route=route)
    assert relative_error(ntk, ntk_by_loop(plain, x, names=names)) < TOLERANCE


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_a_reentrant_checkpoint_behind_a_frozen_layer_learns_nothing(x):
    # torch warns, and training would not move the block: the kernel says so too.
    model = checkpointed(True).double()
    model.stem.requires_grad_(False)
    ntk = empirical_ntk(model, x)
    assert relative_error(ntk, ntk_by_loop(model, x)) < TOLERANCE
    assert relative_error(ntk, empirical_ntk(model, x, parameters="head")) < TOLERANCE


@pytest.mark.parametrize("route", ["auto", *ROUTES])
def test_scaling_by_numbers_and_tensors(net, x, route):
    scaling = {
        name: torch.rand_like(p) if p.ndim == 2 else 0.1 * (index + 1)
        for index, (name, p) in enumerate(net.named_parameters())
    }
    scaling["2.weight"][0] = 0.0  # a dead row of Λ is allowed
    ntk = empirical_ntk(net, x, scaling=scaling, route=route)
    assert relative_error(ntk, ntk_by_loop(net, x, scaling=scaling)) < TOLERANCE


def test_scaling_is_the_step_of_preconditioned_gradient_descent(net, x):
    """f changes by −Θ_Λ ∂L/∂f when θ changes by −Λ ∂L/∂θ, to first order."""
    y, rate = torch.randn(4, 2, dtype=x.dtype), 1e-6
    scaling = {name: torch.rand_like(p) for name, p in net.named_parameters()}
    ntk = as_matrix(empirical_ntk(net, x, scaling=scaling))
    before = net(x)
    ((before - y) ** 2).sum().div(2).backward()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p -= rate * scaling[name] * p.grad
    predicted = -rate * ntk @ (before - y).flatten()
    # The step's second order is left: relative to the first it is of order 1e-6.
    assert relative_error((net(x) - before).flatten(), predicted) < 1e-4

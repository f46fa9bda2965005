"""What products leave behind, and what around them does not reach them."""

import copy

import pytest
import torch
from cases import BY_ID
from false_derivatives import Clamped, through
from networks import mlp
from odd_networks import checkpointed
from oracles import call, relative_error
from tangents import GRAD_IS_LOOKED_AT, TOLERANCE, Counting, dense, operator_of, random

from ntk_callbacks.engine.products import TangentOperator
from ntk_callbacks.errors import UnsupportedModelError

pytestmark = GRAD_IS_LOOKED_AT


def test_a_with_block_prepares_the_model_once(x):
    model = Counting(*mlp()).double()
    operator = TangentOperator(model, x)
    u = random(8)
    Counting.prepared = 0
    with operator as opened:
        for _ in range(5):
            u = opened.ntk_vp(u)
            opened.vjp(u)
        assert opened.quadratic_form(u) > 0
    assert Counting.prepared == 1
    operator.ntk_vp(u)
    assert Counting.prepared == 2


def test_products_are_taken_at_the_present_weights(net, x):
    operator, u = TangentOperator(net, x), random(8)
    before = operator.ntk_vp(u)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.1 * torch.randn_like(p)
    jacobian = dense(net, x)
    assert relative_error(operator.ntk_vp(u), jacobian @ jacobian.mT @ u) < TOLERANCE
    assert relative_error(before, operator.ntk_vp(u)) > 0.01


def test_products_follow_a_half_precision_model(x):
    net = mlp().bfloat16()
    operator, u = TangentOperator(net, x), random(8)
    before = operator.ntk_vp(u)
    with torch.no_grad():
        net[0].weight *= 2
    assert relative_error(before, operator.ntk_vp(u)) > 0.01


def test_the_parameters_are_chosen_once(net, x):
    operator, u = TangentOperator(net, x), random(8)
    expected = operator.vjp(u)
    net[0].requires_grad_(False)
    assert torch.equal(operator.vjp(u), expected)


def test_the_inputs_are_copied(net, x):
    operator, u = TangentOperator(net, x), random(8)
    expected = operator.vjp(u)
    x.zero_()
    assert torch.equal(operator.vjp(u), expected)


def test_overwritten_inputs_and_vectors_are_left_alone():
    model, x = BY_ID["input_overwritten"].build()
    operator, before = TangentOperator(model, x), x.clone()
    u = random(operator.shape[0])
    vector = u.clone()
    first = operator.ntk_vp(u)
    assert torch.equal(operator.ntk_vp(u), first)
    assert torch.equal(x, before)
    assert torch.equal(u, vector)


def flags():
    cuda = torch.backends.cuda
    return (
        torch.get_rng_state().tolist(),
        torch.backends.mha.get_fastpath_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )


@pytest.mark.parametrize("name", ["resnet_train", "transformer", "lstm", "embedding"])
def test_no_trace_is_left(name):
    case = BY_ID[name]
    model, x = case.build()
    model.train()
    call(model, x).sum().backward()
    state = copy.deepcopy(model.state_dict())
    gradients = [p.grad.to_dense().clone() for p in model.parameters()]
    identities = [id(p.grad) for p in model.parameters()]
    training = [module.training for module in model.modules()]
    before = flags()
    assert all(before[1:6])  # as torch starts; an earlier test may have left a trace
    with TangentOperator(model, x, mode=case.mode) as operator:
        operator.ntk_vp(random(operator.shape[0]).sign())
        operator.jvp(random(operator.shape[1]))
        operator.diagonal()
    # Not the draws of the test itself, which the guard takes back as well.
    random(operator.shape[0])
    torch.set_rng_state(torch.tensor(before[0], dtype=torch.uint8))
    operator.ntk_vp(torch.ones(operator.shape[0]))
    assert flags() == before
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    for p, gradient, identity in zip(
        model.parameters(), gradients, identities, strict=True
    ):
        assert id(p.grad) == identity
        assert torch.equal(p.grad.to_dense(), gradient)
        assert p.requires_grad
    assert [module.training for module in model.modules()] == training


def test_no_trace_is_left_by_a_refusal(x):
    model = through(Clamped.apply).train()
    before, operator = flags(), TangentOperator(model, x)
    with pytest.raises(UnsupportedModelError):
        operator.ntk_vp(torch.ones(8))
    assert flags() == before
    assert model.training
    assert operator.vjp(torch.ones(8)).isfinite().all()  # and it is still of use


@pytest.mark.parametrize("name", ["mlp", "lstm", "resnet_train", "attention"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_products_where_gradients_are_off(name, context):
    case = BY_ID[name]
    operator = operator_of(case)
    u, v = random(operator.shape[0]), random(operator.shape[1])
    expected = operator.ntk_vp(u), operator.jvp(v), operator.vjp(u)
    with context():
        inside = operator_of(case)
        u, v = u.clone(), v.clone()
        found = inside.ntk_vp(u), inside.jvp(v), inside.vjp(u)
        named = inside.jvp(inside.as_dict(v))
    for value, reference in zip((*found, named), (*expected, expected[1]), strict=True):
        assert torch.equal(value, reference)
        assert not value.requires_grad
        assert not value.is_inference()


def test_vectors_that_need_gradients_get_none(net, x):
    u = random(8).requires_grad_()
    assert not TangentOperator(net, x).ntk_vp(u).requires_grad
    for model in (net, checkpointed(True).double()):
        assert not TangentOperator(model, x).vjp(u).requires_grad
        assert u.grad is None


def test_measured_under_autocast_as_without(net, x):
    operator, u = TangentOperator(net, x), random(8)
    expected = operator.ntk_vp(u)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(operator.ntk_vp(u), expected)


@pytest.mark.parametrize("where", ["weights", "vector"])
def test_nan_stays_nan(where, net, x):
    u = random(8)
    if where == "weights":
        with torch.no_grad():
            net[0].weight[0, 0] = torch.nan
    else:
        u[0] = torch.nan
    operator = TangentOperator(net, x)
    assert operator.ntk_vp(u).isnan().any()
    assert operator.vjp(u).isnan().any()
    assert operator.quadratic_form(u).isnan()

"""What a plan is good for: other weights, inputs, precisions, but no other problem."""

import copy
import inspect

import plans
import pytest
import torch
from cases import BY_ID
from networks import mlp, vectors
from oracles import TOLERANCE, ntk_by_loop, relative_error

from ntk_callbacks import empirical_ntk, plan_ntk

x = plans.x


@pytest.mark.parametrize(
    "asked",
    [
        {"n": 3},
        {"n": 5},
        {"x2": True},
        {"outputs": "trace"},
        {"outputs": "diagonal"},
        {"parameters": "weight"},
        {"by": "module"},
        {"scaling": True},
        {"mode": "train"},
    ],
    ids=str,
)
def test_a_plan_for_something_else_is_refused(net, x, asked):
    scales = {name: torch.rand_like(p) for name, p in net.named_parameters()}
    n = asked.pop("n", 4)
    if asked.pop("x2", False):
        asked["x2"] = x
    if asked.pop("scaling", False):
        asked["scaling"] = scales
    batch = vectors(n).double()
    message = (
        r"this plan was made for 4×4 examples, outputs='full' and 6 parameters of "
        rf"Sequential; asked for are {n}×{n}, .* Make a plan with the same arguments"
    )
    with pytest.raises(ValueError, match=message):
        empirical_ntk(net, batch, **asked, route=plan_ntk(net, x))


@pytest.mark.parametrize("planned", [{"outputs": "trace"}, {"by": "module"}], ids=str)
def test_a_plan_for_something_special_is_not_one_for_all(net, x, planned):
    plan = plan_ntk(net, x, **planned)
    with pytest.raises(ValueError, match="this plan was made for"):
        empirical_ntk(net, x, route=plan)


def test_something_that_is_neither_a_route_nor_a_plan(net, x):
    with pytest.raises(ValueError, match="route=3; expected one of auto"):
        inspect.unwrap(empirical_ntk)(net, x, route=3)


@pytest.mark.parametrize(
    ("planned", "asked"), [("pseudo", "trace"), ("trace", "pseudo")]
)
def test_a_plan_for_the_sum_of_the_outputs_is_not_one_for_their_trace(
    net, x, planned, asked
):
    plan = plan_ntk(net, x, outputs=planned)
    try:
        ntk = empirical_ntk(net, x, outputs=asked, route=plan)
    except ValueError as error:
        assert "this plan was made for" in str(error)  # noqa: PT017 - or it is right
        return
    assert relative_error(ntk, empirical_ntk(net, x, outputs=asked, route="rows")) < (
        TOLERANCE
    )


@pytest.mark.parametrize("name", ["mlp", "cnn", "tied_weights", "attention"])
def test_a_plan_stays_right_while_the_model_trains(name, fast_only):
    model, x = BY_ID[name].build()
    plan = plan_ntk(model, x)
    before = empirical_ntk(model, x, route=plan)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        ntk = empirical_ntk(model, x, route=plan)
        assert relative_error(ntk, ntk_by_loop(model, x)) < TOLERANCE
    assert relative_error(ntk, before) > 1e-2


def test_a_plan_serves_other_inputs_of_the_same_number(net, x, fast_only):
    plan = plan_ntk(net, x, x[:2])
    other = torch.randn(4, 5, dtype=x.dtype), torch.randn(2, 5, dtype=x.dtype)
    ntk = empirical_ntk(net, *other, route=plan)
    assert relative_error(ntk, ntk_by_loop(net, *other)) < TOLERANCE


@pytest.mark.parametrize("shaped", [False, True])
def test_a_plan_serves_other_values_of_a_scaling(net, x, shaped, fast_only):
    def drawn():
        return {
            name: torch.rand_like(p) if shaped else float(torch.rand(()))
            for name, p in net.named_parameters()
        }

    plan = plan_ntk(net, x, scaling=drawn())
    for _ in range(2):
        scaling = drawn()
        ntk = empirical_ntk(net, x, scaling=scaling, route=plan)
        assert relative_error(ntk, ntk_by_loop(net, x, scaling=scaling)) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_plan_serves_another_precision(dtype, fast_only):
    model, x = mlp(), vectors()
    plan = plan_ntk(model, x)
    ntk = empirical_ntk(model.to(dtype), x, route=plan)
    assert ntk.dtype == dtype
    expected = ntk_by_loop(copy.deepcopy(model).double(), x.double())
    assert relative_error(ntk.double(), expected) < 1e-5

"""A rule that is wrong for a model is found, and the kernel is right all the same."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import BY_ID, in_double
from networks import embedding, mlp, sequences, tokens, vectors
from oracles import each, ntk_by_loop, relative_error
from torch import nn
from torch.nn import functional
from wrong_rules import OUTPUTS, TOLERANCE, WRONG, expected, moved, too_large

from ntk_callbacks import empirical_ntk, plan_ntk
from ntk_callbacks.engine import tap_axes
from ntk_callbacks.engine.batch_axis import BatchAxis, located
from ntk_callbacks.engine.factors import Outer
from ntk_callbacks.engine.rules import RULES

# Rules that are wrong everywhere.


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize(
    ("wrong", "dtype"),
    [
        *(pytest.param(w, torch.float64, id=w.id) for w in WRONG),
        *(pytest.param(w, torch.float32, id=f"{w.id}-single") for w in WRONG[::3]),
    ],
)
def test_exactly_what_a_wrong_rule_spoils_moves(
    wrong, outputs, dtype, monkeypatch, caplog
):
    model, x = wrong.model().to(dtype).eval(), wrong.probe()
    wrong.plant(monkeypatch)
    plan = plan_ntk(model, x, outputs=outputs)
    assert plan.exact.keys() == wrong.spoiled
    assert moved(caplog) == wrong.spoiled
    assert 0 < plan.coverage < 1
    ntk = empirical_ntk(model, x, outputs=outputs, route=plan)
    assert ntk.dtype == dtype
    assert relative_error(ntk.double(), expected(model, x, outputs)) < TOLERANCE[dtype]


@pytest.mark.parametrize("wrong", WRONG[1::3], ids=lambda wrong: wrong.id)
def test_who_makes_no_plan_is_told_as_well(wrong, monkeypatch, caplog):
    model, x = wrong.model().eval(), wrong.probe()
    assert plan_ntk(model, x).coverage == 1.0  # by the right rules
    assert not caplog.records
    wrong.plant(monkeypatch)
    ntk = empirical_ntk(model, x)
    assert moved(caplog) == wrong.spoiled
    assert relative_error(ntk.double(), expected(model, x)) < TOLERANCE[torch.float32]


def test_a_bias_that_is_contracted_alone_stays(monkeypatch, caplog):
    model, x = mlp().double(), vectors().double()
    WRONG[0].plant(monkeypatch)
    plan = plan_ntk(model, x, by="parameter")
    assert plan.exact.keys() == moved(caplog) == {"4.weight"}
    parts = empirical_ntk(model, x, by="parameter", route=plan)
    for name, part in parts.items():
        assert relative_error(part, ntk_by_loop(model, x, names=[name])) < 1e-10


def test_every_layer_that_is_wrong_is_named(monkeypatch, caplog):
    model, x = mlp().double(), vectors().double()
    for shape in [(6, 5), (6, 6)]:
        rule = partial(too_large, RULES[functional.linear], shape=shape)
        monkeypatch.setitem(RULES, functional.linear, rule)
    names = {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert plan_ntk(model, x).exact.keys() == moved(caplog) == names
    assert relative_error(empirical_ntk(model, x), ntk_by_loop(model, x)) < 1e-10


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("outputs", OUTPUTS)
def test_a_wrong_batch_axis(outputs, dtype, monkeypatch, caplog):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)
    x = sequences()

    def misplaced(gradients):
        """The first layer is taken for one whose examples are its time steps."""
        wrong = gradients[0].shape[-1] == 5
        return BatchAxis(1) if wrong else located(gradients)

    monkeypatch.setattr(tap_axes, "located", misplaced)
    plan = plan_ntk(model, x, outputs=outputs)
    assert plan.exact.keys() == moved(caplog) == {"0.weight", "0.bias"}
    ntk = empirical_ntk(model, x, outputs=outputs, route=plan)
    assert relative_error(ntk.double(), expected(model, x, outputs)) < TOLERANCE[dtype]


# Λ sees more of a rule than the plain kernel: where in the weight a number goes.


def permuted_ids(right, call, input, weight, *args, **kwargs):
    return right(call, (input + 1) % len(weight), weight, *args, **kwargs)


def transposed(right, call, input, weight, bias=None):
    uses = right(call, input, weight, bias)
    use = uses[id(weight)]
    if isinstance(use, Outer) and weight.shape == (6, 6):
        uses[id(weight)] = replace(use, matrix=lambda w: w.mT[None])
    return uses


@pytest.mark.parametrize(
    ("function", "rule", "model", "probe", "name"),
    [
        (functional.embedding, permuted_ids, embedding, tokens, "embed.weight"),
        (functional.linear, transposed, mlp, vectors, "2.weight"),
    ],
)
def test_a_rule_that_is_wrong_only_with_a_scaling(
    function, rule, model, probe, name, monkeypatch, caplog
):
    model, x = model().double(), each(in_double, probe())
    monkeypatch.setitem(RULES, function, partial(rule, RULES[function]))
    plan = plan_ntk(model, x)
    assert not plan.exact  # without Λ the kernel does not change
    ntk = empirical_ntk(model, x, route=plan)
    assert relative_error(ntk, ntk_by_loop(model, x)) < 1e-10
    scaling = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    plan = plan_ntk(model, x, scaling=scaling)
    assert plan.exact.keys() == moved(caplog) == {name}
    ntk = empirical_ntk(model, x, scaling=scaling, route=plan)
    assert relative_error(ntk, ntk_by_loop(model, x, scaling=scaling)) < 1e-10


# Rules that are right at the given parameters only, or everywhere but there.


@pytest.mark.parametrize("outputs", OUTPUTS)
def test_a_wrong_rule_behind_a_head_of_zeros(outputs, monkeypatch, caplog):
    """Its kernel is zero now, and wrong after the first step."""
    model, x = mlp().double(), vectors().double()
    nn.init.zeros_(model[4].weight)
    nn.init.zeros_(model[4].bias)
    rule = partial(too_large, RULES[functional.linear], shape=(6, 5))
    monkeypatch.setitem(RULES, functional.linear, rule)
    plan = plan_ntk(model, x, outputs=outputs)
    assert plan.exact.keys() == moved(caplog) == {"0.weight", "0.bias"}
    nn.init.normal_(model[4].weight)
    ntk = empirical_ntk(model, x, outputs=outputs, route=plan)
    assert relative_error(ntk, expected(model, x, outputs)) < 1e-10


@pytest.mark.parametrize("outputs", OUTPUTS)
def test_a_rule_that_is_wrong_at_the_given_parameters_only(
    outputs, monkeypatch, caplog
):
    right = RULES[functional.linear]

    def rule(call, input, weight, bias=None):
        if bias.any():
            return right(call, input, weight, bias)
        return too_large(right, call, input, weight, bias, shape=(6, 5))

    model, x = mlp().double(), vectors().double()
    nn.init.zeros_(model[0].bias)
    monkeypatch.setitem(RULES, functional.linear, rule)
    plan = plan_ntk(model, x, outputs=outputs)
    assert plan.exact.keys() == moved(caplog) == {"0.weight", "0.bias"}
    ntk = empirical_ntk(model, x, outputs=outputs, route=plan)
    assert relative_error(ntk, expected(model, x, outputs)) < 1e-10


# Rules that fail, rather than lie.


def test_a_rule_that_does_not_apply_gives_way_to_the_general_one(monkeypatch):
    def rule(call, *args, **kwargs):
        raise LookupError("not here")

    model, x = BY_ID["layer_norm"].build()
    monkeypatch.setitem(RULES, functional.layer_norm, rule)
    assert plan_ntk(model, x).coverage == 1.0
    assert relative_error(empirical_ntk(model, x), ntk_by_loop(model, x)) < 1e-10


def test_a_rule_that_breaks_on_gradients_gives_way_too(monkeypatch):
    right = RULES[functional.layer_norm]

    def rule(call, input, shape, weight=None, bias=None, eps=1e-5):
        def rows(gradient):
            raise LookupError("not these")

        uses = right(call, input, shape, weight, bias, eps)
        return uses | {id(weight): replace(uses[id(weight)], rows=rows)}

    model, x = BY_ID["layer_norm"].build()
    monkeypatch.setitem(RULES, functional.layer_norm, rule)
    assert plan_ntk(model, x).coverage == 1.0
    assert relative_error(empirical_ntk(model, x), ntk_by_loop(model, x)) < 1e-10

"""Models that do something else than when they were planned are planned anew."""

import logging

import plans
import pytest
import torch
from networks import Computed, mlp
from oracles import TOLERANCE, ntk_by_loop, relative_error
from torch import nn

from ntk_callbacks import empirical_ntk, plan_ntk

x = plans.x


class Switching(nn.Module):
    """Does one of several things, all with weights of the same shapes."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.gain = nn.Parameter(torch.randn(6))
        self.head, self.wide = nn.Linear(6, 2), nn.Linear(6, 3)
        self.which = "a"

    def forward(self, x):
        h = torch.tanh(self.stem(x))
        match self.which:
            case "a":
                h = self.b(torch.tanh(self.a(h))) * self.gain
            case "another order":
                h = self.a(torch.tanh(self.b(h))) * self.gain
            case "another layer twice":
                h = self.b(torch.tanh(self.b(h))) * self.gain
            case "another function":
                h = self.b(torch.tanh(self.a(h))) + self.gain
            case "a branch more":
                h = self.b(torch.tanh(self.a(h))) * self.gain + h * self.gain
            case "a branch less":
                h = torch.tanh(self.a(h))
            case "nothing of the middle":
                pass
            case "more outputs":
                return self.wide(self.b(torch.tanh(self.a(h))) * self.gain)
            case "a layer that no rule covers":
                h = torch.tanh(nn.functional.bilinear(h, h, self.a.weight[None]))
                h = h * self.gain
            case "coupled examples":
                h = self.b(torch.tanh(self.a(h - h.mean(0)))) * self.gain.exp()
        return self.head(torch.tanh(h))


CHANGES = [
    "another order",
    "another layer twice",
    "another function",
    "a branch more",
    "a branch less",
    "nothing of the middle",
    "more outputs",
    "a layer that no rule covers",
    "coupled examples",
]


@pytest.mark.parametrize(
    ("which", "by"),
    [*((which, None) for which in CHANGES), *((w, "parameter") for w in CHANGES[4:7])],
)
def test_a_model_that_changed_is_planned_anew(which, by, x, caplog):
    model = Switching().double()
    plan = plan_ntk(model, x, by=by)
    model.which = which
    with caplog.at_level(logging.INFO, "ntk_callbacks"):
        ntk = empirical_ntk(model, x, by=by, route=plan)
    assert "planned anew" in caplog.text
    if by is not None:
        for name, part in ntk.items():
            alone = ntk_by_loop(model, x, names=[name])
            assert torch.allclose(part, alone, rtol=0, atol=1e-12), name
        ntk = sum(ntk.values())
    assert relative_error(ntk, ntk_by_loop(model, x)) < TOLERANCE


def test_a_frozen_layer_makes_another_problem(net, x):
    plan = plan_ntk(net, x)
    net[2].requires_grad_(False)
    with pytest.raises(ValueError, match=r"6 parameters .* and 4 parameters"):
        empirical_ntk(net, x, route=plan)


def test_another_output_function_is_planned_anew(net, x):
    plan = plan_ntk(net, x)

    def one_output(model, x):
        return model(x)[:, :1]

    def through_a_layer(model, x):
        return model[4](torch.relu(model[2](torch.tanh(model[0](x)))))

    for function in (one_output, through_a_layer):
        ntk = empirical_ntk(net, x, output_fn=function, route=plan)
        expected = ntk_by_loop(net, x, output_fn=function)
        assert relative_error(ntk, expected) < TOLERANCE


def test_a_branch_that_the_outputs_do_not_need(x, fast_only):
    """An auxiliary head is computed, and thrown away."""
    model = Computed(
        lambda self, x: (self.auxiliary(x), self.body(x))[1],
        auxiliary=nn.Linear(5, 3),
        body=mlp(),
    ).double()
    plan = plan_ntk(model, x)
    assert plan.coverage == 1.0
    ntk = empirical_ntk(model, x, route=plan)
    assert relative_error(ntk, ntk_by_loop(model, x)) < TOLERANCE


def test_a_model_that_works_through_its_batch_in_pieces(x):
    model = Computed(
        lambda self, x: torch.cat([self.body(part) for part in x.split(2)]),
        body=mlp(),
    ).double()
    for n in (1, 2, 3, 4):
        ntk = empirical_ntk(model, x[:n])
        assert relative_error(ntk, ntk_by_loop(model, x[:n])) < TOLERANCE


def test_a_model_that_never_does_the_same_is_not_planned_for_ever(x):
    def compute(self, x):
        self.calls += 1
        if self.calls > 100:
            pytest.fail("planned again and again")
        y = self.body(x)
        if len(x) > 2:
            self.large += 1
            return y
        for _ in range(self.large):  # one more use each time
            y = y + 0 * self.shift
        return y

    model = Computed(
        compute, body=mlp(), shift=nn.Parameter(torch.randn(2)), calls=0, large=0
    ).double()
    ntk = empirical_ntk(model, x)
    assert relative_error(ntk, ntk_by_loop(model.body, x)) < TOLERANCE

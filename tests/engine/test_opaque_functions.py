"""Functions that nobody can look into take an exact route, and no other does."""

import pytest
import torch
from networks import Computed, vectors
from oracles import relative_error
from torch import Tensor, nn
from wrong_rules import expected

from ntk_callbacks import empirical_ntk, plan_ntk


class Opaque(torch.autograd.Function):
    """x·w by NumPy: torch sees neither the numbers go in nor come out."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return torch.from_numpy(x.detach().numpy() * w.detach().numpy())

    @staticmethod
    def backward(ctx, gradient):
        x, w = ctx.saved_tensors
        return gradient * w, (gradient * x).sum(0)


class Seen(torch.autograd.Function):
    """x·w by torch."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, gradient):
        x, w = ctx.saved_tensors
        return gradient * w, (gradient * x).sum(0)


def times(x: Tensor, w: Tensor) -> Tensor:
    return x * w


def gated(gate, residual=False):
    """A gain that only `gate` uses, between two layers."""

    def compute(self, x):
        h = torch.tanh(self.stem(x))
        y = gate(h, self.gain)
        return self.head(y + h if residual else y)

    return Computed(
        compute,
        stem=nn.Linear(5, 6),
        gain=nn.Parameter(torch.randn(6)),
        head=nn.Linear(6, 2),
    ).double()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize(
    ("outputs", "residual"), [("full", False), ("full", True), ("trace", True)]
)
@pytest.mark.parametrize("kind", ["opaque", "seen", "script"])
def test_a_parameter_of_a_function_without_a_rule(kind, outputs, residual):
    gate = {
        "opaque": lambda: Opaque.apply,
        "seen": lambda: Seen.apply,
        "script": lambda: torch.jit.script(times),
    }[kind]()
    model, x = gated(gate, residual), vectors().double()
    plan = plan_ntk(model, x, outputs=outputs)
    assert "gain" in plan.exact
    ntk = empirical_ntk(model, x, outputs=outputs, route=plan)
    assert relative_error(ntk, expected(model, x, outputs)) < 1e-10


def test_layers_around_a_function_without_a_rule_stay_fast():
    plan = plan_ntk(gated(Seen.apply), vectors().double())
    assert plan.exact == {"gain": "it is used by a function without a rule"}

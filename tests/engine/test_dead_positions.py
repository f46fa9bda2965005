"""Positions that no output depends on are left out, and never one that matters."""

import pytest
import torch
from networks import Computed
from oracles import ntk_by_loop, relative_error
from torch import nn

from ntk_callbacks import empirical_ntk, plan_ntk

TOLERANCE = 1e-10


def tokens_read(read):
    """Two layers on each of 7 tokens; `read` picks those that the head sees."""
    return Computed(
        lambda self, x: self.head(read(self.b(torch.tanh(self.a(x))))),
        a=nn.Linear(5, 6),
        b=nn.Linear(6, 6),
        head=nn.Linear(6, 3),
    ).double()


def first(h):
    return h[:, 0]


def two(h):
    return h[:, 1] * h[:, 4]


def largest(h):
    """Which token it is depends on the example."""
    return h[torch.arange(len(h)), h[..., 0].argmax(1)]


def nothing(h):
    return 0 * h[:, 0]


def random(n=6):
    return torch.randn(n, 7, 5, dtype=torch.float64)


def routes(plan):
    return {term.name: (term.route, term.sparse) for term in plan.terms}


def test_a_token_that_is_read_alone_is_treated_as_a_vector():
    model, x = tokens_read(first), random()
    plan = plan_ntk(model, x)
    assert routes(plan) == {
        "head.weight": ("paired", False),
        "b.weight": ("paired", True),
        "a.weight": ("paired", True),
    }
    assert relative_error(
        empirical_ntk(model, x, route=plan), ntk_by_loop(model, x)
    ) < (TOLERANCE)
    dense = tokens_read(lambda h: h.mean(1))
    assert plan.flops < plan_ntk(dense, x).flops / 5


@pytest.mark.parametrize("outputs", ["full", "trace", "diagonal", "pseudo"])
@pytest.mark.parametrize("read", [first, two, largest, nothing])
def test_kernel_is_that_of_the_loop(read, outputs):
    model, x = tokens_read(read), random()
    ntk, whole = empirical_ntk(model, x, outputs=outputs), ntk_by_loop(model, x)
    expected = {
        "full": whole,
        "trace": whole.diagonal(dim1=2, dim2=3).mean(2),
        "diagonal": whole.diagonal(dim1=2, dim2=3),
        "pseudo": whole.mean((2, 3)) * whole.shape[2],
    }[outputs]
    assert relative_error(ntk, expected) < TOLERANCE


@pytest.mark.parametrize("read", [first, two, largest])
def test_cross_kernel(read):
    model, x = tokens_read(read), random(9)
    whole = ntk_by_loop(model, x)
    cross = empirical_ntk(model, x[:4], x[4:])
    assert relative_error(cross, whole[:4, 4:]) < TOLERANCE


def test_a_plan_is_right_where_other_positions_matter_than_it_was_made_for():
    """The plan saw token 0 alone; later examples read others, and several."""
    model = tokens_read(largest)
    x = random(40)
    chosen = torch.tanh(model.a(x))
    chosen = model.b(chosen)[..., 0].argmax(1)
    same, others = x[chosen == chosen[0]], x[chosen != chosen[0]]
    assert len(same) >= 2
    assert len(others) >= len(same)
    plan = plan_ntk(model, same)
    assert routes(plan)["b.weight"] == ("paired", True)
    x = others[: len(same)]
    ntk = empirical_ntk(model, x, route=plan)
    assert relative_error(ntk, ntk_by_loop(model, x)) < TOLERANCE


def test_images_of_which_one_pixel_is_read():
    model = Computed(
        lambda self, x: self.head(self.conv(x)[:, :, 1, 2]),
        conv=nn.Conv2d(2, 8, 3, padding=1),
        head=nn.Linear(8, 3),
    ).double()
    x = torch.randn(5, 2, 4, 6, dtype=torch.float64)
    plan = plan_ntk(model, x)
    assert routes(plan)["conv.weight"][1]
    assert relative_error(
        empirical_ntk(model, x, route=plan), ntk_by_loop(model, x)
    ) < (TOLERANCE)

"""Out of memory or out of order: a plan that fails gives way to one that does not."""

import plans
import pytest
import torch
from networks import sequences, vectors
from oracles import TOLERANCE, ntk_by_loop, relative_error
from plans import cut, half_covered, in_parts
from torch import nn

from ntk_callbacks import empirical_ntk, plan_ntk
from ntk_callbacks.engine import execution, kernel, planner, sides

x = plans.x

# Out of memory.


class Scarce:
    """Gradients for which memory is short: the first times, or for many examples."""

    def __init__(self, error, times=0, most=None):
        self.error, self.left, self.most = error, times, most
        self.real = sides.gradients_at
        self.refused = 0

    def __call__(self, taps, number, directions=None):
        many = self.most is not None and taps[0].shape[0] > self.most
        if many or self.left > 0:
            self.left -= 1
            self.refused += 1
            raise self.error
        return self.real(taps, number, directions)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError(),
    RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"
    ),
]


def told(caplog):
    text = "out of memory; half the budget is tried"
    return sum(text in record.message for record in caplog.records)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("times", [1, 3])
def test_out_of_memory_halves_the_budget(
    net, x, error, times, monkeypatch, caplog, fast_only
):
    plan = plan_ntk(net, x)
    scarce = Scarce(error, times)
    monkeypatch.setattr(sides, "gradients_at", scarce)
    ntk = empirical_ntk(net, x, route=plan)
    assert scarce.refused == told(caplog) == times
    assert relative_error(ntk, ntk_by_loop(net, x)) < TOLERANCE


@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.parametrize("second", [False, True])
def test_out_of_memory_ends_in_blocks_that_fit(
    net, most, second, monkeypatch, caplog, fast_only
):
    x = vectors(6).double()
    x2 = x[:3].flip(0) if second else None
    plan = plan_ntk(net, x, x2)
    enough = next(p for p in cut(plan) if p.block == most)
    plan = plan.within(enough.budget * 2**6)
    monkeypatch.setattr(kernel, "_SMALLEST_BUDGET", 1)
    scarce = Scarce(OUT_OF_MEMORY[0], most=most)
    monkeypatch.setattr(sides, "gradients_at", scarce)
    ntk = empirical_ntk(net, x, x2, route=plan)
    assert 0 < scarce.refused == told(caplog) <= 6
    assert relative_error(ntk, ntk_by_loop(net, x, x2)) < TOLERANCE


def test_out_of_memory_for_ever_is_an_error(net, x, monkeypatch, caplog):
    plan = plan_ntk(net, x, memory_budget="64MiB")
    monkeypatch.setattr(sides, "gradients_at", Scarce(OUT_OF_MEMORY[0], most=0))
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        empirical_ntk(net, x, route=plan)
    assert told(caplog) == 7  # 64 MiB, 32, …, 1, and then no more


def test_out_of_memory_on_an_exact_route_halves_its_budget_too(monkeypatch, caplog):
    model, x = half_covered(), sequences().double()
    plan = plan_ntk(model, x, memory_budget="64MiB")
    real, budgets = execution.fallback, []

    def scarce(problem):
        budgets.append(problem.budget)
        if problem.budget > 2**24:
            raise OUT_OF_MEMORY[0]
        return real(problem)

    monkeypatch.setattr(execution, "fallback", scarce)
    ntk = empirical_ntk(model, x, route=plan)
    assert budgets == [2**26, 2**25, 2**24]
    assert relative_error(ntk, ntk_by_loop(model, x)) < TOLERANCE


# Everything else that fails.


@pytest.mark.parametrize("by", [None, "module"])
def test_whatever_fails_leaves_the_exact_route(net, x, by, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("a bug")

    plan = plan_ntk(net, x, by=by)
    monkeypatch.setattr(execution, "contracted_term", broken)
    ntk = empirical_ntk(net, x, by=by, route=plan)
    assert "Sequential: no fast route (ZeroDivisionError('a bug'))" in caplog.text
    whole = sum(in_parts(ntk).values())
    assert relative_error(whole, ntk_by_loop(net, x)) < TOLERANCE


@pytest.mark.parametrize("where", ["surveyed", "terms_of", "failures"])
def test_a_model_that_cannot_be_looked_into(net, x, where, monkeypatch):
    def broken(*args):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(planner, where, broken)
    plan = plan_ntk(net, x)
    reason = "the model cannot be looked into: a bug"
    assert plan.exact == dict.fromkeys(dict(net.named_parameters()), reason)
    assert plan.coverage == plan.flops == 0
    ntk = empirical_ntk(net, x, route=plan)
    assert relative_error(ntk, ntk_by_loop(net, x)) < TOLERANCE


@pytest.mark.parametrize("outputs", ["full", "trace"])
def test_parameters_that_share_a_slot_share_its_gradients(fast_only, outputs):
    """A weight norm makes one weight of two parameters: neither frees it too early."""
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(5, 6))
    model = nn.Sequential(normed, nn.Tanh(), nn.Linear(6, 2)).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    plan = plan_ntk(model, x, outputs=outputs)
    assert plan.coverage == 1
    ntk = empirical_ntk(model, x, outputs=outputs, route=plan)
    whole = ntk_by_loop(model, x)
    if outputs == "trace":
        whole = whole.diagonal(dim1=2, dim2=3).mean(2)
    assert relative_error(ntk, whole) < TOLERANCE

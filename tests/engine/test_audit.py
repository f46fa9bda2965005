"""The audit of a measured kernel: sound ones differ by round-off, others by more."""

import math
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from cases import BY_ID
from networks import Computed, mlp, sequences, vectors
from oracles import ntk_by_loop, relative_error
from torch import nn
from torch.nn import functional
from wrong_rules import OUTPUTS, too_large

from ntk_callbacks.engine import audit as auditing
from ntk_callbacks.engine.arguments import Request
from ntk_callbacks.engine.audit import audit_error
from ntk_callbacks.engine.factors import Outer
from ntk_callbacks.engine.kernel import measured
from ntk_callbacks.engine.planner import planned_for
from ntk_callbacks.engine.rules import RULES
from ntk_callbacks.engine.series import KernelSeries
from ntk_callbacks.guard import measuring

# The audit of a measured kernel.


@contextmanager
def measurement(model, x, change=None, **arguments):
    """The parts of a kernel by a plan from before `change(model)`, and their audit."""
    request = Request(**arguments)
    with measuring(model, "eval"):
        plan = planned_for(request.problem(model, x, None))
        if change is not None:
            change(model)
        problem = request.problem(model, x, None)
        parts, plan = measured(problem, plan)

        def audit(parts=parts, seed=0):
            return audit_error(plan, problem, parts, seed)

        yield parts, audit


def audited(model, x, change=None, **arguments):
    with measurement(model, x, change, **arguments) as (_, audit):
        return audit()


def test_a_rule_that_gives_nan_where_autograd_does_not_is_planned_anew(monkeypatch):
    """Of a kernel that is not finite in truth the error is NaN, and it is kept."""
    real = auditing.contracted_term

    def broken(term, *args, **kwargs):
        kernel = real(term, *args, **kwargs)
        return kernel * torch.nan if term.name == "0.weight" else kernel

    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(4, 3)
    with measurement(model, x) as (_, found):
        assert found() < 1e-4
        monkeypatch.setattr(auditing, "contracted_term", broken)
        assert found() == math.inf


@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        *(("mlp", outputs) for outputs in OUTPUTS),
        *((name, "full") for name in ("cnn", "batch_norm", "tied_weights", "gru")),
        ("attention", "diagonal"),
    ],
)
def test_the_error_of_a_sound_kernel_is_round_off(name, outputs):
    model, x = BY_ID[name].build()
    assert audited(model, x, outputs=outputs) < 1e-12


@pytest.mark.parametrize("name", ["mlp", "batch_norm"])
def test_the_error_of_a_sound_kernel_in_single_precision(name):
    model, x = BY_ID[name].build()
    # ε is 1.2e-7; a plan that is off by 3e-3 is not carried out.
    assert audited(model.float(), x) < 1e-4


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_error_of_a_sound_kernel_in_parts_with_a_scaling(n):
    model, x = mlp().double(), vectors(n).double()
    scaling = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    scaling["2.weight"] = 0.0  # a parameter that does not count
    assert audited(model, x, by="module", scaling=scaling) < 1e-12


@pytest.mark.parametrize("outputs", OUTPUTS)
def test_every_entry_of_a_kernel_counts(outputs):
    model, x = mlp().double(), vectors(2).double()
    with measurement(model, x, outputs=outputs) as (parts, audit):
        kernel = parts[""]
        for index in product(*map(range, kernel.shape)):
            spoiled = kernel.clone()
            spoiled[index] += 1e-3 * kernel.abs().max()
            assert audit({"": spoiled}) > 1e-4, index


def test_every_part_of_a_kernel_counts():
    model, x = mlp().double(), vectors(2).double()
    with measurement(model, x, by="module") as (parts, audit):
        assert parts.keys() == {"0", "2", "4"}
        for name, part in parts.items():
            assert audit(parts | {name: 1.01 * part}) > 1e-4, name


def test_one_seed_or_another_finds_any_pair_of_examples():
    model, x = mlp().double(), vectors(3).double()
    with measurement(model, x) as (parts, audit):
        for i, j in [(0, 1), (0, 2), (2, 1)]:
            spoiled = parts[""].clone()
            spoiled[i, j] *= 1.5
            errors = [audit({"": spoiled}, seed) for seed in range(8)]
            assert max(errors) > 1e-2, (i, j)
            assert min(errors) < 1e-12, (i, j)  # a pair is drawn, not always this one


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_kernel_that_is_not_finite_is_not_sound(outputs, value):
    model, x = mlp().double(), vectors(2).double()
    with measurement(model, x, outputs=outputs) as (parts, audit):
        for place in (0, -1):
            spoiled = parts[""].clone()
            spoiled[place] = value
            assert not math.isfinite(audit({"": spoiled}))


@pytest.mark.parametrize("name", ["0.weight", "2.bias", "4.weight", "4.bias"])
def test_weights_that_became_nan_raise_nothing(name, caplog):
    model, x = mlp().double(), vectors().double()

    def diverge(model):
        with torch.no_grad():
            model.get_parameter(name).view(-1)[0] = torch.nan

    with measurement(model, x, diverge) as (parts, audit):
        affected = name != "4.bias"  # on which no derivative depends
        assert parts[""].isnan().any() == affected
        assert math.isnan(audit()) == affected
    assert not caplog.records
    diverge(model)  # and before it is planned
    with measurement(model, x) as (parts, audit):
        assert parts[""].isnan().any() == math.isnan(audit()) == affected


# Models that became something else after they were planned.


class Turning(nn.Module):
    """Two layers; attributes make it couple its examples, or draw random numbers."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(5, 6), nn.Linear(6, 2)
        self.coupled = self.random = False

    def forward(self, x):
        h = torch.tanh(self.stem(x))
        if self.coupled:
            h = h - h.mean(0)
        if self.random:
            h = functional.dropout(h, 0.5, training=True)
        return self.head(h)


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("what", ["coupled", "random"])
def test_a_model_that_turned_after_planning(what, outputs):
    model, x = Turning().double(), vectors(5).double()
    turn = partial(setattr, model, what, True)
    assert audited(model, x, lambda _: turn(), outputs=outputs) > 1e-2


def test_a_rule_that_went_wrong_after_planning(monkeypatch):
    right, late = RULES[functional.linear], []

    def rule(call, input, weight, bias=None):
        if not late:
            return right(call, input, weight, bias)
        return too_large(right, call, input, weight, bias, shape=(6, 6))

    monkeypatch.setitem(RULES, functional.linear, rule)
    model, x = mlp().double(), vectors().double()
    assert audited(model, x, lambda _: late.append(True)) > 1e-3


def test_a_rule_that_no_proof_sees_ends_on_an_exact_route(monkeypatch, caplog):
    """It is wrong for the third example, where there are three: not in a proof."""
    right = RULES[functional.linear]

    def spoiled(use):
        def rows(gradient):
            found = use.right(gradient).clone()
            found[2:] *= 1.5
            return found

        return replace(use, right=rows) if isinstance(use, Outer) else use

    monkeypatch.setitem(
        RULES,
        functional.linear,
        lambda *args, **kwargs: {
            key: spoiled(use) for key, use in right(*args, **kwargs).items()
        },
    )
    model, x = mlp().double(), vectors(3).double()
    request = Request()
    seen_by = next(
        seed
        for seed in range(20)
        if 2 in torch.randperm(3, generator=torch.Generator().manual_seed(seed))[:2]
    )
    series = KernelSeries()
    for seed in (seen_by, 0, 1, 2):
        parts, error = series.measure(model, x, request, seed)
        assert relative_error(parts[""], ntk_by_loop(model, x)) < 1e-10
        assert error < 1e-10
    (told,) = [r for r in caplog.records if "anew" in r.getMessage()]
    assert "off by" in told.getMessage()


def test_a_model_that_swaps_its_axes_after_planning():
    """With as many time steps as examples, its taps look as they did."""

    def compute(self, x):
        h = torch.tanh(self.stem(x.transpose(0, 1) if self.swap else x))
        return self.head((h.transpose(0, 1) if self.swap else h)[:, 0])

    model = Computed(
        compute, stem=nn.Linear(6, 5), head=nn.Linear(5, 2), swap=False
    ).double()
    swap = partial(setattr, model, "swap", True)
    assert audited(model, sequences(4).double(), lambda _: swap()) > 1e-2

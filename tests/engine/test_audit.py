"""A rule that is wrong for a model is found, and the kernel is right all the same."""

import copy
import logging
import math
import re
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from cases import (
    BY_ID,
    Computed,
    around,
    convolution,
    embedding,
    images,
    in_double,
    mlp,
    sequences,
    settled,
    tokens,
    vectors,
)
from oracles import each, ntk_by_loop, relative_error
from torch import Tensor, nn
from torch.nn import functional

from ntk_callbacks import empirical_ntk, plan_ntk
from ntk_callbacks.engine import audit as auditing
from ntk_callbacks.engine import tap_axes
from ntk_callbacks.engine.arguments import Request
from ntk_callbacks.engine.audit import audit_error
from ntk_callbacks.engine.batch_axis import BatchAxis, located
from ntk_callbacks.engine.factors import Outer
from ntk_callbacks.engine.kernel import measured
from ntk_callbacks.engine.planner import planned_for
from ntk_callbacks.engine.rules import RULES
from ntk_callbacks.guard import measuring

OUTPUTS = ["full", "trace", "diagonal"]

# Sums of some hundred terms: round-off is near 100 ε; the normalizations lose a digit.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def expected(model, x, outputs="full", **arguments):
    """The kernel by the loop in float64, and what `outputs` keeps of it."""
    model = copy.deepcopy(model).double()
    full = ntk_by_loop(model, each(in_double, x), **arguments)
    diagonal = full.diagonal(dim1=2, dim2=3)
    return {"full": full, "trace": diagonal.mean(-1), "diagonal": diagonal}[outputs]


def moved(caplog):
    """The parameters that warnings say take an exact route."""
    found = set()
    for record in caplog.records:
        match = re.search(
            r"'(.*)' takes an exact route: its kernel was off by \d", record.message
        )
        if record.levelno == logging.WARNING and match:
            found.add(match[1])
    return found


# Wrong rules. Each takes the right one and what a rule takes.


def too_large(right, call, input, weight, bias=None, *, shape):
    """1.01 times the gradient of the weights of one shape."""
    uses = right(call, input, weight, bias)
    if weight.shape == shape:
        use = uses[id(weight)]
        uses[id(weight)] = replace(use, right=lambda g: 1.01 * use.right(g))
    return uses


def without_padding(
    right, call, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1
):
    return right(call, input, weight, bias, stride, 0, dilation, groups)


def without_a_position(right, call, input, weight, bias=None, *args):
    """The gradient of the bias misses the first row of every image."""
    uses = right(call, input, weight, bias, *args)
    use = uses[id(bias)]

    def rows(gradient):
        first = torch.zeros_like(gradient[:, :, :1])
        return use.rows(torch.cat([first, gradient[:, :, 1:]], 2))

    return uses | {id(bias): replace(use, rows=rows)}


def with_another_epsilon(right, call, input, shape, weight=None, bias=None, eps=1e-5):
    return right(call, input, shape, weight, bias, eps + 0.1)


def in_one_group(right, call, input, num_groups, weight=None, bias=None, eps=1e-5):
    return right(call, input, 1, weight, bias, eps)


def without_a_mean(right, call, input, mean, *args, **kwargs):
    return right(call, input, torch.zeros_like(mean), *args, **kwargs)


def of_the_token_before(right, call, input, weight, *args, **kwargs):
    return right(call, input.roll(1, 1), weight, *args, **kwargs)


def without_alpha(right, call, input, other, *, alpha=1):
    return right(call, input, other)


def without_beta(right, call, input, mat1, mat2, *, beta=1, alpha=1):
    return right(call, input, mat1, mat2)


@dataclass(frozen=True)
class Wrong:
    """A wrong rule, a network it concerns, and the parameters whose kernels it spoils.

    A bias that is contracted with its weight goes where the weight goes.
    """

    id: str
    function: Callable[..., Any]
    rule: Callable[..., Any]
    model: Callable[[], nn.Module]
    probe: Callable[[], Tensor]
    spoiled: set[str]

    def plant(self, monkeypatch):
        rule = partial(self.rule, RULES[self.function])
        monkeypatch.setitem(RULES, self.function, rule)


def shifted():
    return Computed(
        lambda self, x: self.head(
            torch.tanh(torch.add(self.stem(x), self.shift, alpha=0.5))
        ),
        stem=nn.Linear(5, 6),
        shift=nn.Parameter(torch.randn(6)),
        head=nn.Linear(6, 2),
    )


def doubly_shifted():
    return Computed(
        lambda self, x: self.head(
            torch.tanh(torch.addmm(self.shift, x, self.weight, beta=2))
        ),
        weight=nn.Parameter(torch.randn(5, 6)),
        shift=nn.Parameter(torch.randn(6)),
        head=nn.Linear(6, 2),
    )


WRONG = [
    Wrong(
        "linear_too_large",
        functional.linear,
        partial(too_large, shape=(2, 6)),
        mlp,
        vectors,
        {"4.weight", "4.bias"},
    ),
    Wrong(
        "conv_without_padding",
        functional.conv2d,
        without_padding,
        lambda: convolution(nn.ReLU()),
        images,
        {"0.weight"},
    ),
    Wrong(
        "bias_without_a_position",
        functional.conv2d,
        without_a_position,
        lambda: convolution(nn.ReLU()),
        images,
        {"0.bias"},
    ),
    Wrong(
        "layer_norm_with_another_epsilon",
        functional.layer_norm,
        with_another_epsilon,
        lambda: around(nn.LayerNorm(6), 6),
        vectors,
        {"1.weight"},
    ),
    Wrong(
        "group_norm_in_one_group",
        functional.group_norm,
        in_one_group,
        lambda: convolution(nn.GroupNorm(2, 4), nn.ReLU()),
        images,
        {"1.weight"},
    ),
    Wrong(
        "batch_norm_without_a_mean",
        functional.batch_norm,
        without_a_mean,
        lambda: settled(around(nn.BatchNorm1d(6), 6)),
        vectors,
        {"1.weight"},
    ),
    Wrong(
        "embedding_of_the_token_before",
        functional.embedding,
        of_the_token_before,
        embedding,
        tokens,
        {"embed.weight"},
    ),
    Wrong("add_without_alpha", torch.add, without_alpha, shifted, vectors, {"shift"}),
    Wrong(
        "addmm_without_beta",
        torch.addmm,
        without_beta,
        doubly_shifted,
        vectors,
        {"weight", "shift"},
    ),
]


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


# Functions that nobody can look into.


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

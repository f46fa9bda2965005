"""Plans: what they cost, what they are good for, and what happens when they fail."""

import copy
import inspect
import logging
import re
from functools import partial

import pytest
import torch
from cases import (
    BY_ID,
    Computed,
    around,
    attention,
    convolution,
    embedding,
    images,
    in_double,
    language_model,
    mlp,
    packed_sequences,
    sequences,
    tokens,
    unused_parameter,
    vectors,
)
from oracles import TOLERANCE, each, ntk_by_loop, relative_error
from torch import nn

from ntk_callbacks import empirical_ntk, plan_ntk
from ntk_callbacks.engine import execution, kernel, planner, sides
from ntk_callbacks.errors import MemoryBudgetError


@pytest.fixture
def x():
    return vectors(4).double()


def half_covered():
    """Of these parameters only those of the head have a fast route."""
    return packed_sequences().double()


def term_of(plan, name):
    (term,) = (term for term in plan.terms if term.name == name)
    return term


# The table.


def table(plan):
    """Parameter -> the rest of its line."""
    lines = str(plan).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("parameter "))
    stop = next(i for i, line in enumerate(lines) if line.startswith("contractions "))
    names = [line.split()[0] for line in lines[start + 1 : stop]]
    assert len(names) == len(set(names))
    return dict(zip(names, lines[start + 1 : stop], strict=True))


@pytest.mark.parametrize(
    "name", ["mlp", "cnn", "embedding", "attention", "packed_sequences"]
)
def test_the_table_names_every_parameter_and_its_route(name):
    model, x = BY_ID[name].build()
    plan = plan_ntk(model, x)
    lines = table(plan)
    assert lines.keys() == dict(model.named_parameters()).keys()
    for term in plan.terms:
        assert f" {term.route} " in lines[term.name]
        if term.bias is not None:
            assert " with weight " in lines[term.bias]
    for exact, reason in plan.exact.items():
        assert re.search(rf" exact .* {re.escape(reason)}$", lines[exact])


def test_the_table_names_parameters_that_nothing_uses():
    plan = plan_ntk(unused_parameter().double(), vectors().double())
    assert "idle" in table(plan)


def test_the_table_adds_up():
    model = nn.Sequential(nn.Linear(60, 300), nn.Tanh(), nn.Linear(300, 10))
    plan = plan_ntk(model, torch.randn(30, 60), torch.randn(20, 60))
    text = str(plan)
    first = text.splitlines()[0]
    assert first.startswith("Sequential: full kernel of 30×20 examples, 10 outputs")
    assert first.endswith(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    work = {
        name: float(re.search(r" ([\d.,]+) +[\d.,]+$", line)[1].replace(",", ""))
        for name, line in table(plan).items()
        if "with weight" not in line
    }
    assert work.keys() == {"0.weight", "2.weight"}
    total = float(re.search(r"contractions +([\d.,]+)", text)[1].replace(",", ""))
    assert total == pytest.approx(plan.flops / 1e6, abs=0.05)
    assert sum(work.values()) == pytest.approx(total, abs=0.05 * (1 + len(work)))
    dense = 2 * 30 * 20 * 10**2 * sum(p.numel() for p in model.parameters()) / 1e6
    assert f"J Jᵀ alone would take {dense:,.1f} MFLOP" in text
    assert "100.0% of the parameters are on fast routes" in text


def test_the_table_tells_the_share_of_fast_routes():
    model = half_covered()
    plan = plan_ntk(model, sequences().double())
    assert plan.exact.keys() == {
        f"cells.{n}" for n, _ in model.cells.named_parameters()
    }
    fast = sum(p.numel() for p in model.head.parameters())
    share = fast / sum(p.numel() for p in model.parameters())
    assert plan.coverage == pytest.approx(share)
    assert f"{share:.1%} of the parameters are on fast routes" in str(plan)


def test_the_table_of_a_model_whose_examples_depend_on_one_another():
    model, x = BY_ID["batch_norm_untracked"].build()
    plan = plan_ntk(model, x)
    assert plan.coverage == 0.0
    assert plan.coupled
    assert "The examples depend on one another" in str(plan)
    ntk = empirical_ntk(model, x, route=plan)
    assert relative_error(ntk, ntk_by_loop(model, x)) < TOLERANCE


def test_a_bias_goes_where_its_weight_goes(net, x):
    plan = plan_ntk(net, x).without({"2.weight": "for a reason"})
    beside = "it was planned together with one that does"
    assert plan.exact == {"2.weight": "for a reason", "2.bias": beside}
    assert {name for term in plan.terms for name in term.names} == {
        *("0.weight", "0.bias", "4.weight", "4.bias")
    }
    ntk = empirical_ntk(net, x, route=plan)
    assert relative_error(ntk, ntk_by_loop(net, x)) < TOLERANCE


# What a route costs. Three examples are 6 pairs; two outputs are 6 rows of J.


def early():
    """Many positions (36), few weights (3×18)."""
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(108, 2))


def late(groups=1):
    """Few positions (4), many weights (16×144)."""
    return nn.Sequential(
        nn.Conv2d(16, 16, 3, padding=1, groups=groups), nn.Flatten(), nn.Linear(64, 2)
    )


def large(n=3):
    return torch.randn(n, 2, 6, 6)


def small(n=3):
    return torch.randn(n, 16, 2, 2)


COSTS = [
    # A vector: a·a once and g·g for both outputs.
    ("vectors", lambda: nn.Linear(5, 2), vectors, "full", "paired", 6 * (5 + 4 * 2)),
    ("vectors", lambda: nn.Linear(5, 2), vectors, "trace", "paired", 6 * (5 + 2 * 2)),
    # R t c d to form the rows, then all products of their 54 columns.
    ("early", early, large, "full", "materialized", 6 * 36 * 54 + 6 * 4 * 54),
    ("early", early, large, "trace", "materialized", 6 * 36 * 54 + 6 * 2 * 54),
    # t² products of patches, each applied to o·c gradients; then o² products of t·c.
    ("late", late, small, "full", "factored", 6 * (16 * (144 + 32) + 4 * 4 * 16)),
    ("late", late, small, "trace", "paired", 6 * 16 * (144 + 32)),
    ("late", late, small, "diagonal", "paired", 6 * 16 * (144 + 32)),
    (
        "groups",
        partial(late, groups=2),
        small,
        "full",
        "materialized",
        6 * 2 * 4 * 8 * 72 + 6 * 4 * 2 * 8 * 72,
    ),
    # A table of 7 rows of 5 numbers: all products of the rows that are read.
    ("table", embedding, tokens, "full", "lookup", 6 * 4 * 7 * 5),
    ("table", embedding, tokens, "diagonal", "lookup", 6 * 2 * 7 * 5),
    # Six numbers: their rows, and all products.
    (
        "norm",
        lambda: around(nn.LayerNorm(6), 6),
        vectors,
        "full",
        "rows",
        6 * 4 * 6 + 6 * 6,
    ),
]
WEIGHTS = {"vectors": "weight", "table": "embed.weight", "norm": "1.weight"}


@pytest.mark.parametrize(
    ("name", "model", "probe", "outputs", "route", "work"),
    COSTS,
    ids=[f"{name}-{outputs}" for name, _, _, outputs, _, _ in COSTS],
)
def test_operations(name, model, probe, outputs, route, work, fast_only):
    model, x = model().double(), each(in_double, probe())
    plan = plan_ntk(model, x, outputs=outputs)
    term = term_of(plan, WEIGHTS.get(name, "0.weight"))
    assert (term.route, term.work) == (route, work)
    assert plan.flops == 2 * sum(term.work for term in plan.terms)
    ntk = empirical_ntk(model, x, outputs=outputs, route=plan)
    full = ntk_by_loop(model, x)
    diagonal = full.diagonal(dim1=2, dim2=3)
    right = {"full": full, "trace": diagonal.mean(-1), "diagonal": diagonal}[outputs]
    assert relative_error(ntk, right) < TOLERANCE


def test_operations_of_a_cross_kernel():
    """Rows of both sides, and a product for each of 3×2 pairs."""
    plan = plan_ntk(early(), large(), large(2))
    assert term_of(plan, "0.weight").work == 2 * 5 * 36 * 54 + 6 * 4 * 54
    plan = plan_ntk(nn.Linear(5, 2), vectors(), vectors(2))
    assert term_of(plan, "weight").work == 6 * (5 + 4 * 2)


def test_a_tensor_of_scales_takes_rows_of_the_jacobian():
    model = nn.Linear(5, 2)
    scaling = {"weight": torch.rand(2, 5), "bias": 1.0}
    term = term_of(plan_ntk(model, vectors(), scaling=scaling), "weight")
    assert term.route == "materialized"
    assert term.work == 6 * 2 * 5 + 6 * 4 * 2 * 5


@pytest.mark.parametrize("outputs", ["full", "trace"])
@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_the_cheapest_route_is_taken(size, outputs):
    o, n, t, c, d = 2, 5, size**2, 8, 72
    pairs = n * (n + 1) // 2
    kept = o**2 if outputs == "full" else o
    costs = {
        "materialized": o * n * t * c * d + pairs * kept * c * d,
        "factored": pairs * (t**2 * (d + o * c) + o**2 * t * c),
        "paired": pairs * t**2 * (d + o * c),
    }
    if outputs == "full":
        # One position needs no sum over pairs of positions.
        costs["paired"] = pairs * (d + o**2 * c) if t == 1 else float("inf")
    else:
        del costs["factored"]
    model = nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * t, o)
    )
    plan = plan_ntk(model, torch.randn(n, 8, size, size), outputs=outputs)
    term = term_of(plan, "0.weight")
    assert term.work == min(costs.values())
    assert costs[term.route] == min(costs.values())


# What a plan is good for.


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


# Models that do something else than when they were planned.


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


# Memory.


def cut(plan):
    """The plan within ever less memory, as long as all of it is fast: each cut once."""
    seen, found = set(), []
    budget = 2**19  # more than any of these networks needs
    while not (smaller := plan.within(budget)).exact:
        shape = smaller.block, tuple(len(sweep) for sweep in smaller.sweeps)
        if shape not in seen:
            seen.add(shape)
            found.append(smaller)
        budget = int(budget * 0.85)
    return found


def arguments_for(kind, model, x):
    second = each(lambda tensor: tensor[1:4].flip(0), x)
    scaling = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    return {
        "full": {},
        "trace": {"outputs": "trace"},
        "diagonal": {"outputs": "diagonal"},
        "cross": {"x2": second},
        "cross_by_module": {"x2": second, "by": "module"},
        "by_parameter": {"by": "parameter"},
        "scaling": {"scaling": scaling},
        "cross_scaling_trace": {"x2": second, "scaling": scaling, "outputs": "trace"},
    }[kind]


CUT = {
    "mlp": [
        *("full", "trace", "diagonal", "cross", "cross_by_module", "by_parameter"),
        *("scaling", "cross_scaling_trace"),
    ],
    "cnn": ["full", "scaling", "cross_by_module"],
    "table": ["diagonal", "cross", "scaling"],
    "attention": ["trace", "by_parameter"],
}
CUT_MODELS = {
    "mlp": (mlp, vectors),
    "cnn": (lambda: convolution(nn.GroupNorm(2, 4), nn.ReLU()), images),
    "table": (language_model, tokens),
    "attention": (attention, sequences),
}


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in CUT for kind in CUT[name]]
)
def test_a_plan_that_is_cut_gives_the_same_kernel(name, kind, fast_only):
    factory, probe = CUT_MODELS[name]
    model, x = factory().double(), each(in_double, probe(5))
    arguments = arguments_for(kind, model, x)
    plan = plan_ntk(model, x, **arguments)
    whole = empirical_ntk(model, x, **arguments, route=plan)
    cuts = cut(plan)
    blocks, sweeps = {p.block for p in cuts}, {len(p.sweeps) for p in cuts}
    assert min(blocks) < 5
    assert max(sweeps) > 1
    swept = max((p for p in cuts if p.block == 5), key=lambda p: len(p.sweeps))
    pairwise = max((p for p in cuts if p.block == 2), key=lambda p: len(p.sweeps))
    one_by_one = [cuts[-1]] if kind == "full" else []
    for smaller in (swept, pairwise, *one_by_one):
        found = empirical_ntk(model, x, **arguments, route=smaller)
        for name, part in in_parts(found).items():
            expected = in_parts(whole)[name]
            assert torch.allclose(part, expected, rtol=0, atol=1e-12)
            if "x2" not in arguments:
                mirrored = part.transpose(0, 1)
                mirrored = mirrored.mT if part.ndim == 4 else mirrored
                assert torch.equal(part, mirrored)


def in_parts(found):
    return found if isinstance(found, dict) else {"": found}


def test_a_budget_makes_the_plan_that_within_makes(net, x):
    plan = plan_ntk(net, x)
    smaller = min(cut(plan), key=lambda p: p.block)
    assert smaller.block < 4
    assert plan_ntk(net, x, memory_budget=smaller.budget) == smaller
    assert smaller.within(plan.budget) == plan


def test_a_budget_too_small_says_how_much_is_needed(net, x):
    plan = plan_ntk(net, x, memory_budget=1)
    reason = "it does not fit into the memory budget"
    assert plan.exact == dict.fromkeys(dict(net.named_parameters()), reason)
    with pytest.raises(MemoryBudgetError, match="the budget is") as refused:
        empirical_ntk(net, x, memory_budget=1)
    need = float(re.search(r"at least ([\d.e+-]+) MiB", str(refused.value))[1])
    enough = int(need * 1.01 * 2**20)
    ntk = empirical_ntk(net, x, memory_budget=enough)
    assert relative_error(ntk, ntk_by_loop(net, x)) < TOLERANCE


def test_exact_routes_keep_to_the_budget_of_the_plan(net, x):
    plan = plan_ntk(net, x, memory_budget=1)
    with pytest.raises(MemoryBudgetError):
        empirical_ntk(net, x, route=plan)


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

"""What plans say they cost, by parameter and by route."""

import re
from functools import partial

import plans
import pytest
import torch
from cases import BY_ID, in_double
from networks import around, embedding, sequences, tokens, vectors
from odd_networks import unused_parameter
from oracles import TOLERANCE, each, ntk_by_loop, relative_error
from plans import half_covered
from torch import nn

from ntk_callbacks import empirical_ntk, plan_ntk

x = plans.x


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

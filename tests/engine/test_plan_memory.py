"""Plans that are cut to a memory budget give the same kernel."""

import re

import plans
import pytest
import torch
from cases import in_double
from networks import (
    attention,
    convolution,
    images,
    language_model,
    mlp,
    sequences,
    tokens,
    vectors,
)
from oracles import TOLERANCE, each, ntk_by_loop, relative_error
from plans import cut, in_parts
from torch import nn

from ntk_callbacks import empirical_ntk, plan_ntk
from ntk_callbacks.errors import MemoryBudgetError

x = plans.x


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

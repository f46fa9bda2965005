"""Products keep to a memory budget, in chunks of examples that may be cut apart."""

import re

import pytest
from cases import BY_ID
from oracles import relative_error
from tangents import GRAD_IS_LOOKED_AT, TOLERANCE, dense, dense_of, random

from ntk_callbacks.engine.linearization import examples_that_fit
from ntk_callbacks.engine.products import TangentOperator
from ntk_callbacks.errors import MemoryBudgetError

pytestmark = GRAD_IS_LOOKED_AT


class Sizes:
    """The model's outputs, and how many examples each call was given."""

    def __init__(self):
        self.seen = []

    def __call__(self, model, x):
        self.seen.append(len(x))
        return model(x)


def smallest_budget(*arguments, **options):
    with pytest.raises(MemoryBudgetError) as refused:
        TangentOperator(*arguments, memory_budget=1, **options)
    need = float(re.search(r"at least ([\d.e+-]+) MiB", str(refused.value))[1])
    return int(need * 1.01 * 2**20)  # the message has three digits


def test_a_small_budget_runs_independent_examples_in_chunks(net):
    x, sizes = random(7, 5), Sizes()
    budget = 2 * smallest_budget(net, x)
    operator = TangentOperator(net, x, memory_budget=budget, output_fn=sizes)
    jacobian, u, v = dense(net, x), random(14, 3), random(operator.shape[1], 3)
    sizes.seen.clear()
    assert relative_error(operator.vjp(u), jacobian.mT @ u) < TOLERANCE
    # The three gradients do not fit into the budget either: one after the other.
    assert sizes.seen == 3 * [2, 2, 2, 1]
    assert relative_error(operator.jvp(v), jacobian @ v) < TOLERANCE
    kernel = jacobian @ jacobian.mT
    assert relative_error(operator.ntk_vp(u), kernel @ u) < TOLERANCE
    assert relative_error(operator.diagonal(), kernel.diag()) < TOLERANCE
    assert max(sizes.seen) == 2


def test_a_large_budget_runs_all_examples_at_once(net, x):
    sizes = Sizes()
    operator = TangentOperator(net, x, output_fn=sizes)
    sizes.seen.clear()
    operator.vjp(random(8, 3))
    assert sizes.seen == [4]


def test_coupled_examples_are_never_cut_apart():
    case = BY_ID["batch_norm_untracked"]
    model, x = case.build()
    with pytest.raises(MemoryBudgetError, match=r"the joint batch needs .* fewer exam"):
        TangentOperator(model, x, memory_budget=1)
    operator = TangentOperator(model, x, memory_budget=smallest_budget(model, x))
    jacobian, u = dense_of(case), random(operator.shape[0])
    assert relative_error(operator.ntk_vp(u), jacobian @ jacobian.mT @ u) < TOLERANCE


def test_one_example_that_does_not_fit(net, x):
    with pytest.raises(MemoryBudgetError, match=r"one example needs at least .* MiB"):
        TangentOperator(net, x, memory_budget=1)


def test_graphs_are_counted_for_the_way_there_and_back():
    # Double backward holds three times what one backward pass does.
    assert examples_that_fit(5, False, 100, 300) == 1
    assert examples_that_fit(5, False, 100, 900) == 3
    assert examples_that_fit(5, False, 100, 9000) == 5
    for joint, budget in ((False, 299), (True, 1499)):
        with pytest.raises(MemoryBudgetError):
            examples_that_fit(5, joint, 100, budget)


def test_what_needs_no_graph_fits_any_budget():
    assert examples_that_fit(5, False, 0, 1) == 1
    assert examples_that_fit(5, False, 0, 5) == 5
    assert examples_that_fit(5, True, 100, 1500) == 5

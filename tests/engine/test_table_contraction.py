"""The ways to contract a table that is read by number, against its rows."""

import itertools

import pytest
import torch
from oracles import relative_error
from strands import OUTPUTS, TOLERANCE, WORKSPACES, C, O, contracted, random
from torch import nn

from ntk_callbacks.engine.contraction import Strand, factored, materialized
from ntk_callbacks.engine.factors import Lookup, Outer
from ntk_callbacks.engine.lookup import looked_up
from ntk_callbacks.layout import symmetric


def reading(ids, v=9):
    """Positions that read a table, and gradients for each output."""
    n, t = ids.shape
    use = Lookup(ids, lambda gradient: gradient, (v, C))
    return use, random(O, n, t, C)


def rows_of_table(uses, v=9):
    """J as `(o, n, v·c)`, one position after the other."""
    n = len(uses[0][0].ids)
    j = torch.zeros(O, n, v, C, dtype=torch.float64)
    for use, gradients in uses:
        for i, t in itertools.product(range(n), range(use.ids.shape[1])):
            if use.ids[i, t] >= 0:
                for k in range(O):
                    j[k, i, use.ids[i, t]] += gradients[k][i, t]
    return j.flatten(2)


IDS = {
    "shared": [[0, 1, 2], [2, 1, 1], [0, 0, 8]],
    "alone": [[0, 1, 0], [2, 3, 3], [4, 5, 6]],
    "some_shared": [[0, 1, 1], [2, 1, 2], [3, 4, 3]],
    "without_gradient": [[-1, 1, 1], [2, -1, 1], [-1, -1, -1]],
    "alone_without_gradient": [[-1, 1, 1], [2, -1, 2], [-1, -1, -1]],
    "one_position": [[3], [3], [1]],
}


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_a_table(ids, outputs):
    left = [reading(torch.tensor(ids))]
    j = rows_of_table(left)
    for workspace in WORKSPACES:
        kernel = symmetric(looked_up(left, None, outputs, workspace))
        assert relative_error(kernel, contracted(j, j, outputs)) < TOLERANCE


OTHER_IDS = {"some": [[1, 3, -1], [0, 0, 1]], "none": [[7, 7, -1], [7, 7, 7]]}


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize("other", OTHER_IDS.values(), ids=OTHER_IDS)
def test_a_table_on_two_sides(ids, other):
    left, right = [reading(torch.tensor(ids))], [reading(torch.tensor(other))]
    j1, j2 = rows_of_table(left), rows_of_table(right)
    for outputs, workspace in itertools.product(OUTPUTS, WORKSPACES):
        kernel = looked_up(left, right, outputs, workspace)
        value = contracted(j1, j2, outputs)
        assert torch.allclose(kernel, value, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("outputs", OUTPUTS)
def test_a_table_that_is_read_twice(outputs, workspace):
    left = [
        reading(torch.tensor(IDS["shared"])),
        reading(torch.tensor([[5], [0], [2]])),
    ]
    j = rows_of_table(left)
    kernel = symmetric(looked_up(left, None, outputs, workspace))
    assert relative_error(kernel, contracted(j, j, outputs)) < TOLERANCE
    right = [reading(torch.tensor([[1, 2]])), reading(torch.tensor([[8, 5, 0]]))]
    kernel = looked_up(left, right, outputs, workspace)
    value = contracted(j, rows_of_table(right), outputs)
    assert relative_error(kernel, value) < TOLERANCE


@pytest.mark.parametrize("second", [False, True])
def test_a_table_is_also_a_weight_with_one_hot_inputs(second):
    """Looked up, materialized and factored are the same on the same numbers."""

    def both(ids):
        use, g = reading(torch.tensor(ids))
        hot = nn.functional.one_hot(use.ids, 9).double()
        weight = Outer(
            hot[:, None],
            lambda part, columns: part[..., columns],
            lambda gradient: gradient,
            lambda weight: weight,
            lambda rows: rows,
            (1, hot.shape[1], C, 9),
        )
        return [(use, g)], [Strand(weight, [*g[:, :, None]])]

    table, weight = both(IDS["shared"])
    other, other_weight = both([[1, 3, 8], [0, 0, 1]]) if second else (None, None)
    kernels = [
        looked_up(table, other, "full", 100),
        materialized(weight, other_weight, "full", 100),
        factored(weight, other_weight, 100),
    ]
    if not second:
        kernels = [symmetric(kernel) for kernel in kernels]
    for kernel in kernels[1:]:
        assert relative_error(kernel, kernels[0]) < TOLERANCE

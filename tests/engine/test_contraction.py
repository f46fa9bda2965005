"""The ways to contract a weight, against the definition and against one another."""

import itertools
import math
from functools import partial

import pytest
import torch
from networks import Computed
from oracles import relative_error
from torch import nn

from ntk_callbacks.engine.contraction import (
    Products,
    Strand,
    add_product,
    factored,
    materialized,
    paired,
)
from ntk_callbacks.engine.factors import Call, Lookup, Outer, unexpanded
from ntk_callbacks.engine.lookup import looked_up
from ntk_callbacks.engine.rules import RULES
from ntk_callbacks.engine.survey import surveyed
from ntk_callbacks.functional import ModelFunction
from ntk_callbacks.layout import symmetric

OUTPUTS = ["full", "trace", "diagonal"]
TOLERANCE = 1e-12  # float64, some hundred terms of size 1
O, C, D = 3, 4, 5  # noqa: E741 - outputs, and the axes of the weight
WORKSPACES = [1, 40, 10**6]  # block by block of one, of some, all at once


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def strand(n, t, q=1):
    """A use of a weight by n examples with t positions each, in q groups."""
    use = Outer(
        data=random(n, q, t, D),
        left=lambda part, columns: part[..., columns].clone(),
        right=lambda gradient: gradient,
        matrix=lambda weight: weight,
        weight=lambda rows: rows,
        shape=(q, t, C, D),
        unit=2,
        scratch=q * t,
    )
    return Strand(use, [*random(O, n, q, t, C)])


def side(n, uses, q=1):
    """Uses of one weight with different numbers of positions."""
    return [strand(n, t, q) for t in uses]


def jacobian(strands, scale=1.0, offset=0.0, root=None):
    """J as `(o, n, numbers)` from its definition, bias included."""
    weights, biases = 0.0, 0.0
    for strand in strands:
        g = torch.stack(strand.g)
        weights = weights + torch.einsum("onqtc,nqtd->onqcd", g, strand.use.data)
        biases = biases + torch.einsum("onqtc->onqc", g)
    if root is not None:
        weights = weights * root
    weights, biases = weights.flatten(2) * scale**0.5, biases.flatten(2) * offset**0.5
    return torch.cat([weights, biases], 2)


def contracted(j1, j2, outputs):
    """J₁ J₂ᵀ, summed over the outputs for `"trace"`."""
    formula = {
        "full": "kip,ljp->ijkl",
        "trace": "kip,kjp->ij",
        "diagonal": "kip,kjp->ijk",
    }
    return torch.einsum(formula[outputs], j1, j2)


def expected(left, right, outputs, **factors):
    j1 = jacobian(left, **factors)
    return contracted(j1, j1 if right is None else jacobian(right, **factors), outputs)


def check(kernel, left, right, outputs, **factors):
    whole = symmetric(kernel) if right is None else kernel
    assert relative_error(whole, expected(left, right, outputs, **factors)) < TOLERANCE


USES = [(1,), (3,), (1, 1), (3, 2, 4)]
SIDES = [None, 2, 4]


# One weight.


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("second", SIDES)
@pytest.mark.parametrize("uses", USES, ids=str)
@pytest.mark.parametrize("q", [1, 3])
def test_materialized(q, uses, second, outputs):
    left = side(4, uses, q)
    right = None if second is None else side(second, uses, q)
    root = random(q, C, D).abs()
    for workspace in WORKSPACES:
        kernel = materialized(left, right, outputs, workspace)
        check(kernel, left, right, outputs)
        kernel = materialized(left, right, outputs, workspace, root)
        check(kernel, left, right, outputs, root=root)


FACTORS = [{}, {"scale": 0.3}, {"offset": 1.0}, {"scale": 2.0, "offset": 0.7}]


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("second", SIDES)
@pytest.mark.parametrize("uses", USES, ids=str)
@pytest.mark.parametrize("factors", FACTORS, ids=str)
def test_paired(factors, uses, second, workspace):
    left = side(4, uses)
    right = None if second is None else side(second, uses)
    for outputs in ["trace", "diagonal", *(["full"] if uses == (1,) else [])]:
        kernel = paired(left, right, outputs, workspace, **factors)
        check(kernel, left, right, outputs, **factors)


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("second", SIDES)
@pytest.mark.parametrize("uses", USES, ids=str)
@pytest.mark.parametrize("factors", FACTORS, ids=str)
def test_factored(factors, uses, second, workspace):
    left = side(4, uses)
    right = None if second is None else side(second, uses)
    kernel = factored(left, right, workspace, **factors)
    check(kernel, left, right, "full", **factors)


@pytest.mark.parametrize("n", [4, 40])  # 120 rows of J: only half of the products
@pytest.mark.parametrize("second", SIDES)
def test_paired_adds_to_a_kernel_in_place(second, n):
    left = side(n, (1,))
    right = None if second is None else side(second, (1,))
    value = expected(left, right, "full", scale=2.0, offset=0.7)
    whole = torch.zeros(n + 2, 9, O, O, dtype=torch.float64)
    if right is None:
        whole = torch.zeros(n + 2, n + 2, O, O, dtype=torch.float64)
    part = whole[1 : n + 1, 1 : 1 + value.shape[1]]
    for times in (1, 2):
        assert paired(left, right, "full", 50, 2.0, 0.7, into=part) is part
        kernel = symmetric(part) if right is None else part
        assert relative_error(kernel, times * value) < TOLERANCE
    part.zero_()
    assert not whole.any()  # nothing beside it was written to


@pytest.mark.parametrize("second", SIDES)
def test_all_ways_give_the_same_numbers(second):
    left = side(4, (3, 2))
    right = None if second is None else side(second, (3, 2))
    full = factored(left, right, 50)
    formed = materialized(left, right, "full", 50)
    if right is None:
        full, formed = symmetric(full), symmetric(formed)
    assert relative_error(full, formed) < TOLERANCE
    diagonal = full.diagonal(dim1=2, dim2=3)
    for outputs, value in (("trace", diagonal.sum(-1)), ("diagonal", diagonal)):
        for way in (materialized, paired):
            kernel = way(left, right, outputs, 50)
            kernel = symmetric(kernel) if right is None else kernel
            assert relative_error(kernel, value) < TOLERANCE, way


def test_sides_may_differ_in_their_positions():
    """The same layer on sequences of other lengths."""
    left, right = side(4, (3, 2)), side(3, (1, 5))
    check(factored(left, right, 30), left, right, "full")
    check(materialized(left, right, "full", 30), left, right, "full")
    check(paired(left, right, "trace", 30), left, right, "trace")


def test_the_arguments_are_left_as_they_were():
    left = side(3, (2, 1))
    tensors = [t for s in left for t in (s.use.data, *s.g)]
    before = [tensor.clone() for tensor in tensors]
    factored(left, None, 10, scale=2.0, offset=1.0)
    paired(left, None, "trace", 10, scale=2.0, offset=1.0)
    materialized(left, None, "full", 10, random(1, C, D))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


# Products.


@pytest.mark.parametrize("rows", [1, 63, 64, 100, 256, 301])
def test_the_upper_triangle_of_a_product(rows):
    left = random(rows, 7)
    whole, half = random(rows, rows), torch.zeros(rows, rows, dtype=torch.float64)
    start = whole.clone()
    add_product(whole, left, left.mT, False)
    assert relative_error(whole, start + left @ left.mT) < TOLERANCE
    for _ in range(2):  # it adds
        add_product(half, left, left.mT, True)
    assert relative_error(half.triu(), 2 * (left @ left.mT).triu()) < TOLERANCE
    assert rows < 64 or not half[-1, 0]  # what is left out


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("n", [2, 30])
def test_products_add_up_over_blocks_of_columns(n, second, outputs):
    j1, j2 = random(O, n, 10), random(O, 4, 10) if second else None
    products = Products(outputs, not second)
    for start, stop in itertools.pairwise([0, 1, 6, 10]):
        part = None if j2 is None else j2[..., start:stop]
        products.add(j1[..., start:stop], part)
    kernel = products.kernel(O)
    assert relative_error(kernel, contracted(j1, j2 if second else j1, outputs)) < (
        TOLERANCE
    )


# A table.


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


# What rules say of a weight: the two layouts are the inverse of one another, and the
# rows are those of autograd.


def product(order):
    def compute(self, x):
        return (x @ self.weight if order else self.weight @ x.mT).flatten(1)

    shape = (6, 3) if order else (3, 6)
    return Computed(compute, weight=nn.Parameter(torch.randn(shape)))


LAYERS = {
    "linear": (lambda: nn.Linear(6, 3), (2, 6)),
    "linear_on_sequences": (lambda: nn.Linear(6, 3), (2, 4, 6)),
    "conv_1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 7)),
    "conv_2d": (
        lambda: nn.Conv2d(2, 4, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)),
        (2, 2, 6, 5),
    ),
    "conv_2d_same": (lambda: nn.Conv2d(2, 4, (4, 3), padding="same"), (2, 2, 6, 5)),
    "conv_2d_strided_past_the_end": (
        lambda: nn.Conv2d(2, 3, 2, stride=4),
        (2, 2, 7, 8),
    ),
    "conv_3d": (lambda: nn.Conv3d(2, 2, 2, padding=1), (2, 2, 2, 3, 2)),
    "conv_transpose_1d": (
        lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, groups=2),
        (2, 4, 5),
    ),
    "conv_transpose_2d": (
        lambda: nn.ConvTranspose2d(
            3, 2, (2, 3), stride=2, output_padding=1, dilation=2
        ),
        (2, 3, 3, 2),
    ),
    "product_from_the_right": (partial(product, True), (2, 4, 6)),
    "product_from_the_left": (partial(product, False), (2, 4, 6)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", LAYERS)
def test_rows_of_a_weight(name):
    factory, shape = LAYERS[name]
    model, x = factory().double(), random(*shape)
    function = ModelFunction(model, parameters="weight")
    survey = surveyed(function, function.params | function.fixed, x, ["weight"])
    (member,) = survey.members["weight"]
    (use,) = survey.uses[member.tap]
    tap, call = survey.recording.taps[member.tap], survey.calls[member.tap]
    assert isinstance(use, Outer)
    assert isinstance(call, Call)
    assert tap.function in RULES
    q, t, c, d = use.shape
    weight = model.weight.detach()
    assert q * c * d == weight.numel()
    assert use.matrix(weight).shape == (q, c, d)
    assert torch.equal(use.weight(use.matrix(weight)), weight)
    a = use.a(slice(None))
    assert a.shape == (2, q, t, d)
    for start in range(d):
        for stop in range(start + 1, d + 1):
            assert torch.equal(
                use.a(slice(1, 2), slice(start, stop)), a[1:, :, :, start:stop]
            )
    gradient = random(*tap.shape)
    assert use.right(gradient).shape == (2, q, t, c)
    for i in range(2):  # example by example
        alone = call.first(gradient)[i : i + 1]
        leaf = model.weight.detach().requires_grad_()
        y = torch.func.functional_call(model, {"weight": leaf}, (x[i : i + 1],))
        (row,) = torch.autograd.grad(y, leaf, alone.reshape(y.shape))
        assert relative_error(use.rows(gradient)[i], row) < TOLERANCE


def test_repetitions_of_an_expanded_tensor_are_left_out():
    whole = random(1, 3, 1).expand(4, 3, 5)
    assert unexpanded(whole).shape == (1, 3, 1)
    assert torch.equal(unexpanded(whole).expand(4, 3, 5), whole)
    assert unexpanded(random(4, 3)).shape == (4, 3)
    assert math.prod(unexpanded(random(1).expand(7)).shape) == 1

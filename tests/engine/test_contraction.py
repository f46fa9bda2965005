"""The ways to contract a weight, against the definition and against one another."""

import itertools

import pytest
import torch
from oracles import relative_error
from strands import OUTPUTS, TOLERANCE, WORKSPACES, C, D, O, contracted, random

from ntk_callbacks.engine.contraction import (
    Products,
    Strand,
    add_product,
    factored,
    materialized,
    paired,
)
from ntk_callbacks.engine.factors import Outer
from ntk_callbacks.layout import symmetric


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


def expected(left, right, outputs, **factors):
    j1 = jacobian(left, **factors)
    return contracted(j1, j1 if right is None else jacobian(right, **factors), outputs)


def check(kernel, left, right, outputs, **factors):
    whole = symmetric(kernel) if right is None else kernel
    assert relative_error(whole, expected(left, right, outputs, **factors)) < TOLERANCE


USES = [(1,), (3,), (1, 1), (3, 2, 4)]

SIDES = [None, 2, 4]


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

"""Real architectures: the kernel of `route="auto"` against the loop."""

from functools import cache

import pytest
import torch
from networks import Computed
from oracles import call, jacobian_by_loop, ntk_by_loop, relative_error
from torch import nn
from zoo import ZOO, ZOO_SLOW

from ntk_callbacks import empirical_ntk, plan_ntk
from ntk_callbacks.errors import UnsupportedModelError

# Round-off of float64 is below 1e-12 even for millions of parameters and a hundred
# layers; normalizations that cancel lose two or three digits more.
TOLERANCE = 1e-9


CASES = [*ZOO, *(pytest.param(case, marks=pytest.mark.slow) for case in ZOO_SLOW)]


def measured(case, route):
    model, x = case.build()
    output_fn = None if case.output_fn is call else case.output_fn
    return empirical_ntk(model, x, mode=case.mode, route=route, output_fn=output_fn)


@cache
def by_loop(case):
    model, x = case.build()
    return ntk_by_loop(model, x, output_fn=case.output_fn)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_kernel_is_that_of_the_loop(case, fast_shares):
    model, x = case.build()
    output_fn = None if case.output_fn is call else case.output_fn
    plan = plan_ntk(model, x, mode=case.mode, output_fn=output_fn)
    fast_shares[case.id] = plan.coverage
    assert relative_error(measured(case, plan), by_loop(case)) < TOLERANCE


@pytest.mark.parametrize("case", ZOO, ids=lambda case: case.id)
def test_vmap_is_right_or_refuses(case):
    try:
        ntk = measured(case, "vmap")
    except Exception:
        if case.vmap:
            raise
        return
    assert relative_error(ntk, by_loop(case)) < TOLERANCE


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_parameter_takes_part(case):
    """A contribution of zero could be left out by a route and nobody would notice."""
    model, x = case.build()
    jacobian = jacobian_by_loop(model, x, case.output_fn)
    # The softmax does not change when all keys move by the same vector.
    sizes = {k: v.norm() for k, v in jacobian.items() if not k.endswith("key.bias")}
    smallest = min(sizes, key=sizes.get)
    assert sizes[smallest] > 1e-4 * max(sizes.values()), smallest


def test_layers_with_complex_parameters_are_refused():
    model = Computed(
        lambda self, x: (self.inner(x.to(torch.complex64)) @ self.outer).abs(),
        inner=nn.Linear(5, 6, dtype=torch.complex64),
        outer=nn.Parameter(torch.randn(6, 2, dtype=torch.complex64)),
    )
    with pytest.raises(UnsupportedModelError, match="real and imaginary parts as two"):
        empirical_ntk(model, torch.randn(3, 5))

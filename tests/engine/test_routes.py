"""Every route on every network: the right kernel or a refusal, never a wrong one."""

from functools import cache

import pytest
from cases import CASES
from oracles import call, ntk_by_loop, relative_error

from ntk_callbacks import empirical_ntk
from ntk_callbacks.engine.exact import ROUTES

# Round-off of float64 over at most some thousand additions is below 1e-12; formulas
# that cancel (the normalizations) lose two or three digits more.
TOLERANCE = 1e-9


@cache
def by_loop(case):
    model, x = case.build()
    return ntk_by_loop(model, x, output_fn=case.output_fn)


def must_work(case, route):
    return route in ("auto", "rows") or (route == "vmap" and case.vmap)


def measured(case, model, x, route):
    output_fn = None if case.output_fn is call else case.output_fn
    return empirical_ntk(model, x, mode=case.mode, route=route, output_fn=output_fn)


# torch.compile looks at the `.grad` of what enters the compiled part.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("route", ["auto", *ROUTES])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_kernel_is_that_of_the_loop_or_refused(case, route):
    model, x = case.build()
    try:
        ntk = measured(case, model, x, route)
    except Exception:
        if must_work(case, route):
            raise
        return
    assert relative_error(ntk, by_loop(case)) < TOLERANCE

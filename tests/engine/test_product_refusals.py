"""Products that cannot be: each refusal says what is wrong and what to do."""

import inspect

import pytest
import torch
from networks import Computed, mlp, vectors
from tangents import GRAD_IS_LOOKED_AT, random
from torch import nn

from ntk_callbacks.engine.products import TangentOperator
from ntk_callbacks.errors import UnsupportedModelError

pytestmark = GRAD_IS_LOOKED_AT


@pytest.mark.parametrize(
    ("product", "vector", "message"),
    [
        (
            "jvp",
            torch.ones(8),
            r"jvp: the vector is \(8,\) of .*; expected real .*92,\)",
        ),
        ("vjp", torch.ones(92), r"vjp: the vector is \(92,\) .* \(8,\) or \(8, k\)"),
        (
            "ntk_vp",
            torch.ones(7),
            r"\(7,\) .*J is 8×92: 4 examples × 2 outputs, 92 par",
        ),
        ("ntk_vp", torch.ones(8, 2, 2), r"\(8, 2, 2\)"),
        ("ntk_vp", torch.ones(2, 8), r"\(2, 8\)"),
        ("ntk_vp", torch.tensor(1.0), r"is \(\) of"),
        ("quadratic_form", torch.ones(8).int(), "int32; expected real numbers"),
        ("ntk_vp", torch.ones(8) * 1j, "complex64; expected real numbers"),
    ],
)
def test_vectors_that_do_not_fit(net, x, product, vector, message):
    operator = TangentOperator(net, x)
    # Without the type checks of this test run, as a user calls it.
    method = inspect.unwrap(getattr(TangentOperator, product))
    with pytest.raises(ValueError, match=message):
        method(operator, vector)


def test_mappings_that_do_not_fit(net, x):
    operator = TangentOperator(net, x)
    named = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    bias = named.pop("0.bias")
    with pytest.raises(ValueError, match=r"missing: \['0.bias'\], .*: none"):
        operator.jvp(named)
    with pytest.raises(ValueError, match=r"missing: none, .*\['0.bias'\]"):
        operator.jvp(named | {"0.bias": bias[:2]})
    with pytest.raises(ValueError, match=r"missing: none, .*\['typo'\]"):
        operator.jvp(named | {"0.bias": bias, "typo": bias})


def test_arguments_that_make_no_sense(net, x):
    with pytest.raises(ValueError, match="no example"):
        TangentOperator(net, x[:0])
    with pytest.raises(ValueError, match=r"missing: \['0.weight', "):
        TangentOperator(net, x, scaling={})
    with pytest.raises(ValueError, match="'a lot' is not understood"):
        TangentOperator(net, x, memory_budget="a lot")


def test_random_models_are_refused(x):
    model = Computed(lambda self, x: nn.functional.dropout(self.body(x)), body=mlp())
    with pytest.raises(UnsupportedModelError, match="draws random numbers"):
        TangentOperator(model, vectors())


def test_a_weight_that_is_used_behind_the_modules_back_is_not_missed(x):
    model = Computed(
        lambda self, x: x @ self.captured[0], weight=nn.Parameter(random(5, 2))
    )
    model.captured = [model.weight]
    with pytest.raises(UnsupportedModelError, match="weight"):
        TangentOperator(model, x)

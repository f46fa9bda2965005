"""What rules say of a weight: its layouts and rows are those of autograd."""

import math
from functools import partial

import pytest
import torch
from networks import Computed
from oracles import relative_error
from strands import TOLERANCE, random
from torch import nn

from ntk_callbacks.engine.factors import Call, Outer, unexpanded
from ntk_callbacks.engine.rules import RULES
from ntk_callbacks.engine.survey import surveyed
from ntk_callbacks.functional import ModelFunction

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

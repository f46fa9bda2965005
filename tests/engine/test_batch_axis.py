"""Where in a tap the examples lie."""

import pytest
import recordings
import torch
from networks import Computed, attention, sequences
from recordings import check_kernel, surveyed_on
from torch import nn

from ntk_callbacks import plan_ntk
from ntk_callbacks.engine.batch_axis import BatchAxis, located

x = recordings.x

N, T = 2, 3

LAYOUTS = {
    # name: (from (N, T, 4) to the layout, its batch axis)
    "first": (lambda y: y, BatchAxis(0)),
    "second": (lambda y: y.transpose(0, 1), BatchAxis(1)),
    "last": (lambda y: y.movedim(0, -1), BatchAxis(2)),
    "major": (lambda y: y.flatten(0, 1), BatchAxis(0)),
    "minor": (lambda y: y.transpose(0, 1).flatten(0, 1), BatchAxis(0, minor=True)),
    "major_inside": (lambda y: y.movedim(2, 0).flatten(1), BatchAxis(1)),
    "minor_inside": (
        lambda y: y.permute(2, 1, 0).flatten(1),
        BatchAxis(1, minor=True),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_batch_axis_of_a_layout(name):
    laid_out, axis = LAYOUTS[name]
    y = torch.randn(N, T, 4)
    gradients = []
    for i in range(N):
        own = torch.zeros_like(y)
        own[i] = y[i]
        gradients.append(laid_out(own))
    assert located(gradients) == axis
    tensor = laid_out(y)
    first = axis.first(tensor, N)
    for i in range(N):
        assert torch.equal(
            first[i].flatten().sort().values, y[i].flatten().sort().values
        )
        example = axis.example(tensor, N, i)
        assert torch.equal(example, laid_out(y[i : i + 1]))
    assert first.data_ptr() == tensor.data_ptr()  # a view


def test_no_batch_axis():
    y = torch.randn(N, T, 4)
    assert located([y, y]) is None  # every example everywhere
    assert located([torch.zeros_like(y), y]) is None  # unknown of the first
    own = [torch.zeros(3, 3), torch.zeros(3, 3)]
    own[0][0, 0], own[1][2, 2] = 1.0, 1.0
    assert located(own) is None  # no axis holds two examples
    with pytest.raises(LookupError, match=r"axis 1 of shape \(2, 3, 4\) holds no 2 ex"):
        BatchAxis(1).first(y, N)
    with pytest.raises(LookupError, match="axis 3"):
        BatchAxis(3).first(y, N)


def windows(x):
    """(n, 4, 6) to two windows of each example, `(2·n, 2, 6)`."""
    return x.reshape(len(x) * 2, 2, 6)


AXES = {
    "sequence_first": (
        lambda self, x: self.layer(x.transpose(0, 1)).transpose(0, 1).flatten(1),
        BatchAxis(1),
    ),
    "windows": (
        lambda self, x: self.layer(windows(x)).reshape(len(x), -1),
        BatchAxis(0),
    ),
    "time_by_time": (
        lambda self, x: (
            self.layer(x.transpose(0, 1).reshape(-1, 6))
            .view(4, len(x), 6)
            .transpose(0, 1)
        ).flatten(1),
        BatchAxis(0, minor=True),
    ),
    "one_axis_more": (
        lambda self, x: self.layer(x[None, :, :, None]).squeeze(0).flatten(1),
        BatchAxis(1),
    ),
}


@pytest.mark.parametrize("name", AXES)
def test_the_batch_axis_inside_a_network(name):
    compute, axis = AXES[name]
    model = Computed(
        lambda self, x: self.head(torch.tanh(compute(self, x))),
        layer=nn.Linear(6, 6),
        head=nn.Linear(24, 2),
    ).double()
    for n in (2, 5):
        x = sequences(n).double()
        survey = surveyed_on(model, x)
        assert [place.axis for place in survey.places] == [axis, BatchAxis(0)]
        assert plan_ntk(model, x).coverage == 1.0
        check_kernel(model, x)


def test_attention_works_sequence_first():
    axes = [
        place.axis for place in surveyed_on(attention().double(), sequences()).places
    ]
    assert BatchAxis(1) in axes

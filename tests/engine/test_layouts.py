"""Layouts and lengths that two examples, or the lucky number of them, do not tell."""

import pytest
import torch
from networks import Computed
from oracles import TOLERANCE, ntk_by_loop, relative_error
from torch import nn
from torch.nn import functional

from ntk_callbacks import empirical_ntk, plan_ntk
from ntk_callbacks.engine.batch_axis import BatchAxis, telling_count


def check(model, x, outputs="full"):
    ntk = empirical_ntk(model, x, outputs=outputs)
    expected = ntk_by_loop(model, x)
    if outputs == "trace":
        expected = expected.diagonal(dim1=2, dim2=3).mean(-1)
    assert relative_error(ntk, expected) < TOLERANCE


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# What is read of an example decides which layouts its gradients fit.


def read_in_part(arrange, read):
    """Layers on `(examples and other things, 4)`, of which little is read."""

    def compute(self, x):
        y = self.second(torch.tanh(self.first(arrange(x))))
        return self.head(torch.tanh(read(y, x)))

    return Computed(
        compute, first=nn.Linear(4, 5), second=nn.Linear(5, 6), head=nn.Linear(6, 2)
    ).double()


def by_time(x):
    return x.transpose(0, 1).flatten(0, 1)


def middle_frame(y, x):
    n, frames = x.shape[:2]
    return y.view(frames, n, -1)[frames // 2]


def own_frame(y, x):
    """Another frame of each example: its first number says which."""
    n, frames = x.shape[:2]
    return y.view(frames, n, -1)[(x[:, 0, 0] * frames).long(), range(n)]


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("frames", [2, 3, 5])
@pytest.mark.parametrize("read", [middle_frame, own_frame])
def test_frames_before_examples(read, frames, n):
    model = read_in_part(by_time, read)
    x = doubles(n, frames, 4)
    x[:, 0, 0] = torch.arange(n) / n
    assert plan_ntk(model, x).coverage == 1.0
    check(model, x)


@pytest.mark.parametrize("frames", [3, 4, 5])
@pytest.mark.parametrize("place", [0, 1, -1])
def test_examples_before_frames(place, frames):
    model = read_in_part(
        lambda x: x.flatten(0, 1), lambda y, x: y.view(len(x), -1, 6)[:, place]
    )
    x = doubles(5, frames, 4)
    assert plan_ntk(model, x).coverage == 1.0
    check(model, x)


@pytest.mark.parametrize(("frames", "windows"), [(2, 4), (3, 4), (3, 7), (1, 13)])
@pytest.mark.parametrize("place", [0, -1])
def test_examples_between_frames_and_windows(place, frames, windows):
    def arrange(x):
        return x.view(len(x), frames, windows, 4).transpose(0, 1).flatten(0, 2)

    def read(y, x):
        return y.view(frames, len(x), windows, -1)[frames // 2, :, place]

    check(read_in_part(arrange, read), doubles(5, frames * windows, 4))


def test_as_many_examples_as_tell_them_apart():
    major, minor = BatchAxis(0), BatchAxis(0, minor=True)
    assert telling_count([(major, 1), (minor, 1)]) == 2
    assert telling_count([(major, 196)]) == 3  # major fits before minor is tried
    assert telling_count([(minor, 3)]) == 3
    assert telling_count([(minor, 4)]) == 4  # 4 windows of 1 frame: 4 = 1 modulo 3
    assert telling_count([(minor, 4), (minor, 5)]) == 5
    assert telling_count([(minor, 7), (major, 9)]) == 4


# A length that is that of the batch by chance.


def clamped(bound):
    """Between a parameter and something of fixed size, by a function without a rule.

    The upper bound wins where it is below the lower one, which has no gradient then.
    """
    return Computed(
        lambda self, x: self.head(torch.clamp(self.stem(x), self.low, bound(self, x))),
        stem=nn.Linear(4, 6),
        low=nn.Parameter(torch.randn(6)),
        high=nn.Parameter(torch.randn(6), requires_grad=False),
        head=nn.Linear(6, 2),
    ).double()


BOUNDS = {
    "constant": lambda self, x: self.high.detach(),
    "of_the_data": lambda self, x: x.new_ones(6) * self.high.detach(),
}


@pytest.mark.parametrize("n", [5, 6, 7])
@pytest.mark.parametrize("bound", BOUNDS)
def test_channels_as_many_as_examples(bound, n):
    model, x = clamped(BOUNDS[bound]), doubles(n, 4)
    check(model, x)
    assert "low" not in plan_ntk(model, x).exact


def latents(mask):
    """Learned queries, copied for every example, that look at what the data holds."""

    def compute(self, x):
        queries = self.queries.expand(len(x), -1, -1)
        y = functional.scaled_dot_product_attention(
            queries, self.key(x), self.value(x), attn_mask=mask(x)
        )
        return self.head(y.mean(1))

    return Computed(
        compute,
        queries=nn.Parameter(torch.randn(1, 4, 6)),
        key=nn.Linear(5, 6),
        value=nn.Linear(5, 6),
        head=nn.Linear(6, 2),
    ).double()


MASKS = {
    "none": lambda x: None,
    "constant": lambda x: torch.linspace(0, 1, 12, dtype=torch.float64).view(4, 3),
    "of_the_data": lambda x: x.new_ones(4, 3).tril(),
}


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("mask", MASKS)
def test_queries_as_many_as_examples(mask, n):
    model, x = latents(MASKS[mask]), doubles(n, 3, 5)
    assert plan_ntk(model, x).coverage == 1.0
    check(model, x)
    check(model, x, "trace")


# Parameters that are shown many times.


def test_a_kernel_that_all_channels_share():
    def compute(self, x):
        return functional.conv2d(x, self.filter.expand(4, 1, 3, 3), groups=4).flatten(1)

    model = Computed(compute, filter=nn.Parameter(torch.randn(1, 1, 3, 3))).double()
    x = doubles(3, 4, 4, 4)
    assert plan_ntk(model, x).coverage == 1.0
    check(model, x)


@pytest.mark.parametrize("outputs", ["full", "trace"])
def test_a_toeplitz_matrix(outputs):
    """A view of 8 numbers as 4×5: rows have a gradient for each of the 20."""
    model = Computed(
        lambda self, x: functional.linear(x, self.taps.unfold(0, 5, 1)),
        taps=nn.Parameter(torch.randn(8)),
    ).double()
    x = doubles(3, 5)
    assert plan_ntk(model, x).coverage == 1.0
    check(model, x, outputs)

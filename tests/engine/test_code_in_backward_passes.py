"""What users do to gradients is left to passes of one output at a time."""

import logging

import pytest
import torch
from networks import Computed, images, vectors
from oracles import ntk_by_loop, relative_error
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as torch calls it

from ntk_callbacks import empirical_ntk, plan_ntk
from ntk_callbacks.engine.arguments import Request
from ntk_callbacks.engine.series import KernelSeries


class StraightThrough(torch.autograd.Function):
    """The sign, with a gradient by `.data`: torch dies of it under vmap."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient.data * (x.abs() < 1)


def quantized_vectors():
    return Computed(
        lambda self, x: self.b(StraightThrough.apply(self.a(x))),
        a=nn.Linear(5, 6),
        b=nn.Linear(6, 3),
    ), vectors(4)


def quantized_images():
    x = images()
    return Computed(
        lambda self, x: self.b(StraightThrough.apply(self.a(x)).flatten(1)),
        a=nn.Conv2d(x.shape[1], 3, 3),
        b=nn.LazyLinear(2),
    ), x


def clipped_gradients():
    def forward(self, x):
        h = torch.tanh(self.a(x))
        if h.requires_grad:
            h.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1))
        return self.b(h)

    return Computed(forward, a=nn.Linear(5, 6), b=nn.Linear(6, 3)), vectors(4)


@pytest.mark.parametrize(
    "build", [quantized_vectors, quantized_images, clipped_gradients]
)
def test_such_models_are_measured_output_by_output(build, caplog):
    torch.manual_seed(0)
    model, x = build()
    x = x.double()
    model = model.double()
    model(x)  # a lazy layer takes its shape
    expected = ntk_by_loop(model, x)
    plan = plan_ntk(model, x)
    assert plan.at_once == 0
    assert relative_error(empirical_ntk(model, x, route=plan), expected) < 1e-12
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            parts, error = KernelSeries().measure(model, x, Request(), step)
            assert relative_error(parts[""], expected) < 1e-12
            assert error < 1e-12
    assert not caplog.records


def test_passes_of_all_outputs_keep_to_the_budget():
    """A large image before a small one, and many outputs: 200 images would be held."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 1), nn.Tanh(), nn.AdaptiveAvgPool2d(4), nn.Flatten()
    ).append(nn.Linear(64, 200))
    x = torch.randn(4, 1, 256, 256)
    assert plan_ntk(model, x, outputs="trace", memory_budget="64MiB").at_once < 1
    assert plan_ntk(model, x[..., :16, :16]).at_once > 1


def test_a_tap_without_gradient_does_not_take_the_axis_of_another_layout():
    """The same weight on (example, time) and, where a gate is open, (time, example)."""

    def forward(self, x):
        n, t, d = x.shape
        rows = F.linear(x.reshape(n * t, d), self.w).tanh().view(n, t, -1).mean(1)
        x = x.transpose(0, 1)
        columns = F.linear(x.reshape(t * n, d), self.w).tanh().view(t, n, -1).mean(0)
        return rows + columns * torch.relu(x[0, :, :1])

    torch.manual_seed(0)
    model = Computed(forward, w=nn.Parameter(torch.randn(5, 3))).double()
    x = torch.randn(6, 4, 3, dtype=torch.double)
    x[:, 0, 0] = torch.tensor([-1.0, 2, 3, 1, 2, -1])  # shut for the first and the last
    assert relative_error(empirical_ntk(model, x), ntk_by_loop(model, x)) < 1e-12

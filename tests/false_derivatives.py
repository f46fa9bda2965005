"""Functions that are wrong about their derivatives, and a model around one."""

import torch
from networks import Computed
from torch import nn


class Wrong(torch.autograd.Function):
    """Twice its input forwards; what it says about its derivatives is up to a test."""

    backward_factor, jvp_factor = 2.0, 2.0

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @classmethod
    def backward(cls, ctx, gradient):
        return cls.backward_factor * gradient

    @classmethod
    def jvp(cls, ctx, tangent):
        return cls.jvp_factor * tangent


class Clamped(Wrong):
    """Its backward pass is not linear, so no J has it."""

    @staticmethod
    def backward(ctx, gradient):
        return (2 * gradient).clamp(-0.1, 0.1)


def through(function):
    return Computed(
        lambda self, x: self.head(function(torch.tanh(self.stem(x)))),
        stem=nn.Linear(5, 6),
        head=nn.Linear(6, 2),
    ).double()

"""Expectations as sums that one can check by eye; activations without closed forms."""

import math

import torch

# The same functions under names that bring no closed form.
TWINS = {
    "relu": lambda x: x.clamp(min=0),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "abs": lambda x: x.abs(),
    "linear": lambda x: 1.0 * x,
    "erf": lambda x: torch.erf(x),
    "sin": lambda x: torch.sin(x),
}

SMOOTH = ["tanh", "gelu", "sigmoid", "silu", "softplus"]

VARIANCES = torch.tensor([1e-6, 0.05, 0.7, 3.0, 40.0], dtype=torch.float64)


def trapezoid(function, step=0.02):
    """E function(z), z standard normal: exponentially exact for analytic functions."""
    z = torch.arange(-12, 12 + step / 2, step, dtype=torch.float64)
    density = (-(z**2) / 2).exp() / math.sqrt(2 * math.pi)
    return (step * density * function(z)).sum().item()


def slope(phi):
    def derivative(x):
        x = x.detach().clone().requires_grad_()
        return torch.autograd.grad(phi(x).sum(), x)[0]

    return derivative

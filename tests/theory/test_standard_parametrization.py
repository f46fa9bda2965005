"""Learning rates by parameter, and the standard parametrization with them."""

import math

import pytest
import torch
from infinite_width import ROOT2, X, tensor
from torch import nn

from ntk_callbacks import empirical_ntk
from ntk_callbacks.theory import (
    Learning,
    activate,
    dense,
    fully_connected,
    infinite_width_kernels,
    sequential,
)


def test_learning_rate_tensor():
    """Roberts, Yaida and Hanin: Θ' = λ_b + λ_W E φφ + C_W E φ'φ' Θ with λ = 1.

    Three hidden layers, rates λ_W/n for the weights and λ_b for biases that start at
    0; numpy, 8 digits.
    """

    def layer(fan_in):
        learning = Learning("standard", fan_in, bias=True, weight_rate=1 / fan_in)
        return dense(ROOT2, learning=learning)

    hidden = [sequential(activate("relu"), layer(99)) for _ in range(3)]
    network = sequential(layer(4), *hidden)
    found = infinite_width_kernels(network, X[:2]).ntk
    expected = tensor([[5.0, 3.20762844], [3.20762844, 5.0]])
    assert torch.allclose(found, expected, rtol=0, atol=6e-9)


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (1, [108.5, 79.8441, 48.9131, 108.5, 139.8668, 560.0]),
        (2, [37.0278, 25.139, 22.9329, 37.0278, 43.9084, 186.9444]),
    ],
)
def test_default_initialization_of_torch(depth, expected):
    """nn.Linear: Var W = Var b = 1/(3 fan_in), width 512; numpy, 4 digits."""

    def layer(fan_in):
        learning = Learning("standard", fan_in)
        return dense(1 / math.sqrt(3), 1 / math.sqrt(3 * fan_in), learning=learning)

    hidden = [sequential(activate("relu"), layer(512)) for _ in range(depth)]
    network = sequential(layer(4), *hidden)
    found = infinite_width_kernels(network, 2 * X[:3]).ntk
    upper = found[tuple(torch.triu_indices(3, 3))]
    assert torch.allclose(upper, tensor(expected), rtol=0, atol=6e-5)


def test_standard_parametrization_is_weights_by_width_and_biases_by_one():
    """With rates σ_w²/n and σ_b² it is the kernel of the NTK parametrization."""

    def layer(fan_in, sigma_w=1.3, sigma_b=0.4):
        learning = Learning(
            "standard", fan_in, weight_rate=sigma_w**2 / fan_in, bias_rate=sigma_b**2
        )
        return dense(sigma_w, sigma_b, learning=learning)

    network = sequential(layer(4), activate("tanh"), layer(77), activate("tanh"))
    network = sequential(network, layer(77))
    expected = fully_connected(X, depth=2, activation="tanh", sigma_w=1.3, sigma_b=0.4)
    found = infinite_width_kernels(network, X)
    assert torch.allclose(found.ntk, expected.ntk, rtol=1e-13)
    assert torch.equal(found.nngp, expected.nngp)


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_model_in_standard_parametrization(bias):
    """Θ = X Xᵀ, and 1 more with a bias, wherever the parameters are."""
    layer = nn.Linear(4, 1, bias=bias).double()
    for given in (bias, None) if not bias else (bias,):
        network = dense(0.7, learning=Learning("standard", 4, bias=given))
        found = infinite_width_kernels(network, X).ntk
        expected = empirical_ntk(layer, X, outputs="trace")
        assert torch.allclose(found, expected, rtol=0, atol=1e-14)


class StandardCommittee(nn.Module):
    """S networks 4 -> 5 -> 1 in standard parametrization, summed and divided by √S."""

    def __init__(self, seeds):
        super().__init__()
        shapes = {"w": (5, 4), "b": (1, 5), "v": (1, 5), "a": (1, 1)}
        scales = {"w": 1.3 / 4**0.5, "b": 0.4, "v": 1.3 / 5**0.5, "a": 0.4}
        for name, shape in shapes.items():
            draw = scales[name] * torch.randn(seeds, *shape, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(draw))

    def forward(self, x):
        h = torch.tanh(x @ self.w.mT + self.b)
        return (h @ self.v.mT + self.a).sum(0) / len(self.w) ** 0.5


def test_standard_parametrization_against_the_engine():
    """One hidden layer: the mean over networks is the formula at any width."""
    means = torch.stack(
        [empirical_ntk(StandardCommittee(200), X, outputs="trace") for _ in range(20)]
    )
    theory = fully_connected(
        X,
        depth=1,
        activation="tanh",
        sigma_w=1.3,
        sigma_b=0.4,
        parametrization="standard",
        width=5,
    ).ntk
    error = means.std(0) / len(means) ** 0.5
    assert error.norm() < 0.02 * theory.norm()  # so that the test can tell
    assert ((means.mean(0) - theory).abs() < 4 * error).all()

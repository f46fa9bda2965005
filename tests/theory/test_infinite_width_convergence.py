"""Networks of finite width, measured by our engine, on their way to the theory.

With F the error of one network relative to the infinite kernel, in Frobenius norm, two
statistics are read off S seeds. The root mean square of F over seeds estimates c/√n
with a standard deviation of about 1/√S of itself, so that its slope in log n is sharp:
it is what the slopes are fitted to. The error of the mean over S seeds is smaller by
√S, one draw from a wide distribution, and beyond that holds the bias of finite width,
O(1/n): it is held to a bound, not to a slope.
"""

import math

import pytest
import torch
from infinite_width import TABLES
from oracles import relative_error
from torch import nn

from ntk_callbacks import empirical_ntk
from ntk_callbacks.experiments.layers import Conv2d, Linear
from ntk_callbacks.theory import (
    Learning,
    activate,
    convolutional,
    dense,
    fully_connected,
    infinite_width_kernels,
    sequential,
)

X = torch.tensor(TABLES["x"], dtype=torch.float64)
IMAGES = torch.tensor(TABLES["images"], dtype=torch.float64)
ROOT2 = math.sqrt(2)
TORCH = {
    "relu": torch.relu,
    "erf": torch.erf,
    "tanh": torch.tanh,
    "gelu": nn.functional.gelu,
    "hard_tanh": nn.functional.hardtanh,
}


class Activation(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.function = TORCH[name]

    def forward(self, x):
        return self.function(x)


def mlp(width, *, depth, activation, sigma_w, sigma_b):
    """A network in NTK parametrization with one output."""
    scales = {"parametrization": "ntk", "sigma_w": sigma_w, "sigma_b": sigma_b}
    parts = []
    for index in range(depth):
        parts += [Linear(width if index else 4, width, **scales)]
        parts += [Activation(activation)]
    return nn.Sequential(*parts, Linear(width, 1, **scales))


def cnn(width, *, depth, activation, sigma_w, sigma_b, head):
    scales = {"parametrization": "ntk", "sigma_w": sigma_w, "sigma_b": sigma_b}
    parts = []
    for index in range(depth):
        parts += [Conv2d(width if index else 3, width, **scales)]
        parts += [Activation(activation)]
    pool = [nn.AdaptiveAvgPool2d(1)] if head == "pool" else []
    readout = Linear(width if pool else 16 * width, 1, **scales)
    return nn.Sequential(*parts, *pool, nn.Flatten(), readout)


NETWORKS = {
    "relu": (mlp, {"depth": 2, "activation": "relu", "sigma_w": ROOT2, "sigma_b": 0.1}),
    "erf": (mlp, {"depth": 2, "activation": "erf", "sigma_w": 1.5, "sigma_b": 0.3}),
    "tanh": (mlp, {"depth": 2, "activation": "tanh", "sigma_w": 1.5, "sigma_b": 0.3}),
    "cnn_flatten": (
        cnn,
        {
            **{"depth": 2, "activation": "relu", "sigma_w": ROOT2, "sigma_b": 0.1},
            "head": "flatten",
        },
    ),
    "cnn_pool": (
        cnn,
        {
            **{"depth": 1, "activation": "relu", "sigma_w": ROOT2, "sigma_b": 0.1},
            "head": "pool",
        },
    ),
}


def measured(build, arguments, x, width, seeds, route="auto"):
    """Kernels in float32: its round-off, 1e-6, is far below what is looked for."""
    x = x.float()
    kernels = [
        empirical_ntk(build(width, **arguments), x, outputs="trace", route=route)
        for _ in range(seeds)
    ]
    return torch.stack(kernels).double()


def theory(build, arguments):
    if build is cnn:
        return convolutional(IMAGES, **arguments).ntk
    return fully_connected(X, **arguments).ntk


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_errors_fall_with_the_root_of_the_width(name):
    build, arguments = NETWORKS[name]
    images = build is cnn
    widths = [16, 32, 64, 128] if images else [32, 64, 128, 256, 512]
    limit = theory(build, arguments)
    errors = []
    for width in widths:
        kernels = measured(build, arguments, IMAGES if images else X, width, 120)
        squares = (kernels - limit).square().sum((1, 2)) / limit.square().sum()
        errors.append(squares.mean().sqrt().item())
    logs = torch.tensor([widths, errors], dtype=torch.float64).log()
    centered = logs - logs.mean(1, keepdim=True)
    slope = (centered[0] @ centered[1] / centered[0].square().sum()).item()
    assert slope == pytest.approx(-0.5, abs=0.1), errors
    assert errors[-1] < 3 / widths[-1] ** 0.5  # and to the theory, not elsewhere


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "sigma_w", "sigma_b", "depth"),
    [
        ("relu", ROOT2, 0.1, 1),
        ("tanh", 1.5, 0.3, 1),
        ("relu", ROOT2, 0.1, 3),
        ("erf", 1.5, 0.3, 3),
        ("tanh", 1.5, 0.3, 3),
        ("gelu", 1.5, 0.1, 3),
    ],
)
def test_sixty_seeds_of_width_2048(activation, sigma_w, sigma_b, depth):
    """The mean is off by less than 0.02, and no network by more than 0.20.

    One network of three layers is off by c/√n with c of 1.9 to 2.9, the mean of twenty
    by 0.009 to 0.014: beyond 0.02 in one draw out of ten, so that the second best of
    three draws is looked at. Of sixty it is 0.008 at most.
    """
    arguments = {"depth": depth, "activation": activation}
    arguments |= {"sigma_w": sigma_w, "sigma_b": sigma_b}
    limit = theory(mlp, arguments)
    kernels = measured(mlp, arguments, X, 2048, 60)
    assert relative_error(kernels.mean(0), limit) <= 0.02
    twenties = [relative_error(part.mean(0), limit) for part in kernels.split(20)]
    assert sorted(twenties)[1] <= 0.02
    assert max(relative_error(kernel, limit) for kernel in kernels) <= 0.20


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 2])
def test_networks_as_torch_initializes_them(depth):
    """nn.Linear as it comes: Var W = Var b = 1/(3 fan_in), standard parametrization."""

    def layer(fan_in):
        learning = Learning("standard", fan_in)
        return dense(1 / math.sqrt(3), 1 / math.sqrt(3 * fan_in), learning=learning)

    hidden = [sequential(activate("relu"), layer(512)) for _ in range(depth)]
    limit = infinite_width_kernels(sequential(layer(4), *hidden), X).ntk

    def network(width):
        parts = [nn.Linear(4, width), nn.ReLU()]
        for _ in range(depth - 1):
            parts += [nn.Linear(width, width), nn.ReLU()]
        return nn.Sequential(*parts, nn.Linear(width, 1))

    kernels = measured(network, {}, X, 512, 60)
    errors = [relative_error(kernel, limit) for kernel in kernels]
    # 0.07 and 0.10 for one network on 4 inputs, and less for the mean by √60.
    assert relative_error(kernels.mean(0), limit) <= 0.03
    assert sum(errors) / 60 <= 0.15


@pytest.mark.slow
@pytest.mark.parametrize("head", ["flatten", "pool"])
@pytest.mark.parametrize("depth", [1, 2])
def test_twenty_seeds_of_256_channels(head, depth):
    arguments = {"depth": depth, "activation": "relu", "head": head}
    arguments |= {"sigma_w": ROOT2, "sigma_b": 0.1}
    kernels = measured(cnn, arguments, IMAGES, 256, 20)
    assert relative_error(kernels.mean(0), theory(cnn, arguments)) <= 0.04


class Committee(nn.Module):
    """S networks with one hidden layer of four units, summed and divided by √S.

    Its kernel is the mean of theirs: the mean over S seeds in one measurement.
    """

    def __init__(self, activation, sigma_w, sigma_b, seeds):
        super().__init__()
        self.phi, self.sigma_w, self.sigma_b = TORCH[activation], sigma_w, sigma_b
        shapes = {"w": (4, 4), "b": (1, 4), "v": (1, 4), "a": (1, 1)}
        for name, shape in shapes.items():
            draw = torch.randn(seeds, *shape, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(draw))

    def forward(self, x):
        h = self.phi(self.sigma_w / 2 * x @ self.w.mT + self.sigma_b * self.b)
        f = self.sigma_w / 2 * h @ self.v.mT + self.sigma_b * self.a
        return f.sum(0) / len(self.w) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "sigma_w", "sigma_b"),
    [
        ("relu", ROOT2, 0.0),
        ("tanh", 1.5, 0.3),
        ("gelu", 1.2, 0.1),
    ],
)
def test_four_units_and_40_000_seeds(activation, sigma_w, sigma_b):
    """With one hidden layer E Θ_n = Θ_∞ exactly, at every width and in every entry."""
    means = torch.stack(
        [
            empirical_ntk(
                Committee(activation, sigma_w, sigma_b, 500), X, outputs="trace"
            )
            for _ in range(80)
        ]
    )
    limit = fully_connected(
        X, depth=1, activation=activation, sigma_w=sigma_w, sigma_b=sigma_b
    ).ntk
    error = means.std(0) / len(means) ** 0.5
    assert error.norm() < 0.01 * limit.norm()  # so that the test can tell
    assert ((means.mean(0) - limit).abs() < 4 * error).all()


@pytest.mark.parametrize("depth", [1, 3])
def test_homogeneous_networks_are_right_on_average_at_any_width(depth):
    """ReLU without biases: E Θ_n(x, x) = Θ_∞(x, x) at every depth and width."""
    arguments = {"depth": depth, "activation": "relu", "sigma_w": ROOT2, "sigma_b": 0.0}
    kernels = measured(mlp, arguments, X[:1], 32, 60, "rows").flatten()
    error = kernels.std().item() / len(kernels) ** 0.5
    expected = theory(mlp, arguments)[0, 0].item()
    assert expected == pytest.approx((depth + 1) * 2 / 4, rel=1e-13)
    assert error < 0.12 * expected
    assert abs(kernels.mean().item() - expected) < 4 * error

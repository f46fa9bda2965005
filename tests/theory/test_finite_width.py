"""Fluctuations over seeds against tables, exact special cases and drawn networks."""

import inspect
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from ntk_callbacks import empirical_ntk
from ntk_callbacks.theory import (
    PiecewiseLinear,
    activation_relative_variance,
    ntk_mean,
    ntk_relative_variance,
    ntk_relative_variance_at_large_width,
    seed_statistics,
)

# Independent NumPy implementation of the exact recursion: layers -> n Var/mean² for n
# to infinity, Var/mean² for n = 64 and for n = 256.
RELU = {
    1: (3.0, 0.046875, 0.011719),
    2: (6.444446, 0.103760, 0.025365),
    3: (10.000004, 0.166233, 0.039676),
    4: (13.600008, 0.233642, 0.054403),
    5: (17.222236, 0.305980, 0.069464),
    8: (28.148189, 0.554918, 0.116425),
    16: (57.411946, 1.524459, 0.254333),
    32: (116.041167, 6.075266, 0.593069),
    64: (233.356976, 63.215064, 1.623026),
}
LINEAR = {
    1: (1.0, 0.015625, 0.003906),
    2: (2.222222, 0.035156, 0.008708),
    3: (3.500001, 0.056104, 0.013760),
    4: (4.800001, 0.077983, 0.018934),
    5: (6.111113, 0.100643, 0.024187),
    8: (10.074080, 0.172929, 0.040282),
    16: (20.705909, 0.398373, 0.085111),
    32: (42.020315, 1.029742, 0.182693),
    64: (84.677388, 3.555231, 0.413298),
}


@pytest.mark.parametrize(
    ("activation", "table"),
    [("relu", RELU), ("linear", LINEAR)],
    ids=["relu", "linear"],
)
def test_table(activation, table):
    for depth, (leading, at_64, at_256) in table.items():
        for width, expected in ((64, at_64), (256, at_256)):
            found = ntk_relative_variance([width] * depth, activation=activation)
            assert found == pytest.approx(expected, abs=6e-7)
        wide = 10**7
        found = ntk_relative_variance([wide] * depth, activation=activation)
        assert wide * found == pytest.approx(leading, rel=2e-6)
        found = ntk_relative_variance_at_large_width(wide, depth, activation=activation)
        assert wide * found == pytest.approx(leading, rel=2e-5)


@pytest.mark.parametrize("depth", range(1, 9))
def test_leading_orders_are_those_of_the_literature(depth):
    relu = depth * (11 * depth + 7) / (3 * (depth + 1))
    found = ntk_relative_variance_at_large_width(100, depth)
    assert 100 * found == pytest.approx(relu, rel=1e-14)
    linear = depth * (4 * depth + 2) / (3 * (depth + 1))
    found = ntk_relative_variance_at_large_width(100, depth, activation="linear")
    assert 100 * found == pytest.approx(linear, rel=1e-14)


@pytest.mark.parametrize("slope", [0.3, -0.5, -1.0])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_other_slopes_have_their_leading_order_too(slope, depth):
    activation = PiecewiseLinear(1.0, slope)
    exact = ntk_relative_variance([10**6] * depth, activation=activation)
    leading = ntk_relative_variance_at_large_width(10**6, depth, activation=activation)
    assert exact == pytest.approx(leading, rel=3e-5)


def test_special_cases():
    for n in (1, 2, 7, 32):
        assert ntk_relative_variance([n]) == pytest.approx(3 / n, rel=1e-12)
        found = ntk_relative_variance([n], activation="linear")
        assert found == pytest.approx(1 / n, rel=1e-12)
        # |x| keeps the length of every vector: as the linear network, one layer deep.
        found = ntk_relative_variance([n], activation="abs")
        assert found == pytest.approx(1 / n, rel=1e-12)
    assert ntk_relative_variance([]) == 0
    assert ntk_relative_variance_at_large_width(10, 0) == 0
    # The slopes' common scale is that of the weights, which drops out.
    expected = ntk_relative_variance([5, 9], activation="leaky_relu")
    twice = PiecewiseLinear(2.0, 0.02)
    found = ntk_relative_variance([5, 9], activation=twice)
    assert found == pytest.approx(expected, rel=1e-12)
    assert activation_relative_variance([]) == 0


def test_activations_scatter_as_the_table_says():
    found = activation_relative_variance([32] * 8)
    assert found + 1 == pytest.approx(3.1946, abs=5e-5)
    assert activation_relative_variance([4, 8]) == pytest.approx(
        (1 + 5 / 4) * (1 + 5 / 8) - 1, rel=1e-12
    )
    linear = activation_relative_variance([4, 8], activation="linear")
    assert linear == pytest.approx((1 + 2 / 4) * (1 + 2 / 8) - 1, rel=1e-12)


class Nets(nn.Module):
    """Bias-free networks in NTK parametrization, σ_w = √2: one output of each."""

    def __init__(self, sizes, activation, seeds):
        super().__init__()
        self.weights = nn.ParameterList(
            torch.randn(seeds, m, n, dtype=torch.float64)
            for n, m in pairwise([*sizes, 1])
        )
        self.activation = activation

    def forward(self, x):
        a = x.mT
        for layer, w in enumerate(self.weights):
            a = self.activation(a) if layer else a
            a = (2 / w.shape[2]) ** 0.5 * (w @ a)
        return a[:, 0].mT  # (examples, seeds)


def drawn_kernels(sizes, activation, x, seeds):
    """Θ(x, x) of many networks by hand: |∂f/∂W|² of every layer, all seeds at once."""
    slopes = PiecewiseLinear(*activation)
    layers = [
        torch.randn(seeds, m, n, dtype=torch.float64) for n, m in pairwise([*sizes, 1])
    ]
    a = x.expand(seeds, -1)
    inputs, derivatives = [], []
    for layer, w in enumerate(layers):
        inputs.append(a)
        h = (2 / w.shape[2]) ** 0.5 * (w @ a[..., None])[..., 0]
        if layer < len(layers) - 1:
            right, left = (torch.full_like(h, slope) for slope in activation)
            derivatives.append(torch.where(h > 0, right, left))
            a = slopes(h)
    back = torch.ones(seeds, 1, dtype=torch.float64)
    total = torch.zeros(seeds, dtype=torch.float64)
    for layer in reversed(range(len(layers))):
        n = layers[layer].shape[2]
        total += 2 / n * (back**2).sum(1) * (inputs[layer] ** 2).sum(1)
        if layer:
            back = (2 / n) ** 0.5 * (back[:, None] @ layers[layer])[:, 0]
            back = back * derivatives[layer - 1]
    return total


def test_kernels_drawn_by_hand_are_those_of_the_engine():
    x = torch.randn(5, dtype=torch.float64)
    torch.manual_seed(3)
    nets = Nets([5, 7, 6], nn.LeakyReLU(0.3), 4)
    torch.manual_seed(3)
    found = drawn_kernels([5, 7, 6], (1.0, 0.3), x, 4)
    expected = empirical_ntk(nets, x[None], outputs="diagonal")[0, 0]
    assert torch.allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize(
    "activation", [(1.0, 0.0), (1.0, 1.0), (1.0, 0.3), (1.0, -0.5)]
)
@pytest.mark.parametrize("widths", [(3,), (8, 4), (6, 12, 5)])
def test_drawn_networks_of_unequal_widths_scatter_as_foretold(widths, activation):
    """Small networks, where nothing is of leading order: within four errors."""
    x = torch.randn(4, dtype=torch.float64)
    slopes = PiecewiseLinear(*activation)
    kernels = drawn_kernels([4, *widths], activation, x, 100_000)
    expected = ntk_mean(x.square().mean().item(), depth=len(widths), activation=slopes)
    error = kernels.std().item() / 100_000**0.5
    assert abs(kernels.mean().item() - expected) < 4 * error
    variance = expected**2 * ntk_relative_variance(widths, activation=slopes)
    squares = (kernels - expected) ** 2
    error = squares.std().item() / 100_000**0.5
    # The error is small enough to tell, for example, a missing term of 10 %.
    assert abs(squares.mean().item() - variance) < 4 * error < 0.1 * variance


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "module"), [("relu", nn.ReLU()), ("linear", nn.Identity())]
)
def test_kernels_of_the_engine_scatter_as_foretold(activation, module):
    """n = 32, 4000 seeds: variance within 10 %, mean within 2 %."""
    x = torch.randn(1, 6, dtype=torch.float64)
    kernels = torch.cat(
        [
            empirical_ntk(
                Nets([6, 32, 32], module, 100), x, outputs="diagonal", route="rows"
            )[0, 0]
            for _ in range(40)
        ]
    )
    found = seed_statistics(list(kernels[:, None, None]))
    mean = ntk_mean(x.square().mean().item(), depth=2, activation=activation)
    assert found.mean.item() == pytest.approx(mean, rel=0.02)
    expected = ntk_relative_variance([32, 32], activation=activation)
    assert found.relative_variance.item() == pytest.approx(expected, rel=0.1)


def test_statistics_of_seeds():
    kernels = [torch.randn(3, 3, 2, 2, dtype=torch.float64) for _ in range(50)]
    found = seed_statistics(kernels)
    entries = [kernel[1, 2, 0, 1].item() for kernel in kernels]
    mean = sum(entries) / 50
    variance = sum((e - mean) ** 2 for e in entries) / 49
    fourth = sum((e - mean) ** 4 for e in entries) / 50
    assert found.mean[1, 2, 0, 1].item() == pytest.approx(mean, rel=1e-12)
    assert found.variance[1, 2, 0, 1].item() == pytest.approx(variance, rel=1e-12)
    error = found.mean_error[1, 2, 0, 1].item()
    assert error == pytest.approx((variance / 50) ** 0.5, rel=1e-12)
    error = found.variance_error[1, 2, 0, 1].item()
    expected = ((fourth - variance**2 * 47 / 49) / 50) ** 0.5
    assert error == pytest.approx(expected, rel=1e-12)


def test_errors_of_the_statistics_are_their_spread():
    """Of many groups of seeds, Gaussian kernels of known variance 4."""
    groups = [
        seed_statistics(list(2 * torch.randn(200, 1, 1, dtype=torch.float64)))
        for _ in range(400)
    ]
    means = torch.stack([g.mean for g in groups])
    variances = torch.stack([g.variance for g in groups])
    mean_error = torch.stack([g.mean_error for g in groups]).mean().item()
    variance_error = torch.stack([g.variance_error for g in groups]).mean().item()
    assert mean_error == pytest.approx(means.std().item(), rel=0.15)
    assert variance_error == pytest.approx(variances.std().item(), rel=0.15)
    assert variances.mean().item() == pytest.approx(4, rel=0.02)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"piecewise linear one .*variance is known"):
        ntk_relative_variance([4], activation="tanh")
    with pytest.raises(ValueError, match="activation is 'rely', expected one of"):
        ntk_relative_variance([4], activation="rely")
    with pytest.raises(ValueError, match="slopes not all 0"):
        ntk_relative_variance([4], activation=PiecewiseLinear(0.0, 0.0))
    with pytest.raises(ValueError, match=r"widths are \[4, 0\]; expected whole"):
        ntk_relative_variance([4, 0])
    with pytest.raises(ValueError, match="depth is -1"):
        ntk_relative_variance_at_large_width(4, -1)
    with pytest.raises(ValueError, match="sigma_w is -1"):
        ntk_mean(1.0, depth=1, sigma_w=-1.0)
    with pytest.raises(ValueError, match="squared_norm is nan"):
        ntk_mean(math.nan, depth=1)
    with pytest.raises(ValueError, match=r"1 kernels of shapes \[\(2, 2\)\]"):
        seed_statistics([torch.eye(2)])
    with pytest.raises(ValueError, match="at least 2 of one shape"):
        inspect.unwrap(seed_statistics)([torch.eye(2), torch.eye(3)])

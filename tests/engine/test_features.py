"""Features against forward passes by hand, loops, and infinite width."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from layers_by_hand import ByHand, array, by_hand, inputs, mlp
from torch import nn
from torch.nn import functional

from ntk_callbacks import conjugate_kernel, layer_features, theory
from ntk_callbacks.engine.activation_patterns import activation_patterns
from ntk_callbacks.errors import UnsupportedModelError


def gram(first, second):
    kernel = np.empty((len(first), len(second)))
    for i, j in product(range(len(first)), range(len(second))):
        kernel[i, j] = sum(first[i] * second[j]) / first.shape[1]
    return kernel


def close(tensor, expected):
    np.testing.assert_allclose(array(tensor), expected, rtol=1e-12, atol=1e-13)


def test_kernels_of_a_network_by_hand():
    net, x, x2 = mlp(4, 7, 5, 3), inputs(6, 4), inputs(2, 4, seed=2)
    (first, _), (_, last) = by_hand(net, x)
    close(layer_features(net, x), last)
    close(conjugate_kernel(net, x), gram(last, last))
    close(conjugate_kernel(net, x, x2), gram(last, by_hand(net, x2)[1][1]))
    close(conjugate_kernel(net, x, layer="0"), gram(first, first))
    outputs = array(net(x))
    close(conjugate_kernel(net, x, layer=""), gram(outputs, outputs))
    close(conjugate_kernel(net, x, layer="4"), gram(outputs, outputs))
    kernel = conjugate_kernel(net.float(), x.float())
    assert kernel.dtype == torch.float32
    assert torch.equal(kernel, kernel.T)


def test_a_convolutional_network_by_hand():
    """Positions count as features; the last convolution reads all of them."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(2, 3, 2), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 2)),
        nn.Flatten(),
    ).double()
    x = inputs(3, 2, 4, 4)
    w, b, images = array(net[0].weight), array(net[0].bias), array(x)
    z = np.empty((3, 3, 3, 3))
    for i, k, p, q in product(range(3), repeat=4):
        z[i, k, p, q] = b[k] + (w[k] * images[i, :, p : p + 2, q : q + 2]).sum()
    rows = z.reshape(3, -1)
    # In place or not: what a layer returned is what is meant.
    close(conjugate_kernel(net, x, layer="0"), gram(rows, rows))
    rows = np.where(rows > 0, rows, 0)
    close(layer_features(net, x), rows)
    close(conjugate_kernel(net, x), gram(rows, rows))
    (pattern,) = activation_patterns(net, x).values()
    dead = sum(all(rows[i, k] <= 0 for i in range(3)) for k in range(27))
    assert (pattern.size, pattern.units, pattern.dead) == (81, 27, dead)
    assert dead > 0


def test_wide_random_networks_have_the_kernel_of_theory():
    """K of the second hidden layer is (NNGP − σ_b²)/σ_w² of depth 2, up to 1/√N."""
    torch.manual_seed(0)
    width, sigma_w, sigma_b = 4096, 1.3, 0.4
    net = nn.Sequential(
        *(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
        nn.Linear(width, 2),
    )
    for layer in (net[0], net[2]):
        nn.init.normal_(layer.weight, std=sigma_w / layer.in_features**0.5)
        nn.init.normal_(layer.bias, std=sigma_b)
    x = inputs(5, 6).float()
    exact = theory.fully_connected(
        x.double(), depth=2, activation="relu", sigma_w=sigma_w, sigma_b=sigma_b
    ).nngp
    expected = (exact - sigma_b**2) / sigma_w**2
    found = conjugate_kernel(net, x).double()
    error = (found - expected).norm() / expected.norm()
    assert error < 5 / math.sqrt(width)  # and off by 1 with another normalization


class Residual(nn.Module):
    """A layer called twice, then a stream that is added to in place."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3).double()
        self.unused = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3).double()

    def forward(self, x):
        h = self.inner(x)
        h += self.inner(h)
        return self.norm(h)


def test_layers_called_twice_count_by_their_last_call():
    net, x = Residual(), inputs(4, 3)
    once = net.inner(x)
    close(layer_features(net, x), array(once))  # though `h +=` has overwritten it
    close(layer_features(net, x, layer="inner"), array(net.inner(once)))


class Stream(nn.Module):
    """Tokens in the order (time, example, channel), and a recurrent layer's tuple."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(3, 4).double()
        self.head = nn.Linear(4, 2).double()

    def forward(self, x):
        states, _ = self.rnn(x.transpose(0, 1))
        return self.head(states).transpose(0, 1)


def test_sequences_and_tuples():
    net, x = Stream(), inputs(5, 5, 3)  # as many time steps as examples
    states = net.rnn(x.transpose(0, 1))[0].transpose(0, 1)
    rows = array(states.reshape(5, -1))
    close(layer_features(net, x), rows)
    close(layer_features(net, x, layer="rnn"), rows)
    close(layer_features(net, x[:1]), rows[:1])
    pooled = layer_features(
        net, x, layer="", output_fn=lambda m, x: m.rnn(x.transpose(0, 1))[0].mean(0)
    )
    close(pooled, array(states.mean(1)))
    with pytest.raises(
        ValueError, match=r"20 features.*12 of one of x2.*pad sequences"
    ):
        conjugate_kernel(net, x, x[:, :3])


def test_models_of_one_layer_have_their_inputs_as_features():
    x = inputs(4, 3)
    for net in (nn.Linear(3, 2).double(), mlp(3, 2), nn.Sequential(mlp(3, 2))):
        close(conjugate_kernel(net, x), gram(array(x), array(x)))


def test_last_layers_of_other_kinds():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.last = mlp(3, 4, 4), nn.Bilinear(4, 4, 2).double()
            self.table = nn.Parameter(torch.zeros(2, 2))  # makes no layer of it

        def forward(self, x):
            h = self.net(x)
            return self.last(h, h)

    net, x = Pair(), inputs(4, 3)
    close(layer_features(net, x), array(net.net(x)))
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2).double())
    net = nn.Sequential(mlp(3, 4, 4), normed, nn.BatchNorm1d(2).double())
    close(layer_features(net, x), array(net[0](x)))


def test_training_mode_reads_batch_statistics_and_moves_none():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    x = inputs(6, 3)
    z = array(x)
    expected = (z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5)
    close(layer_features(net, x, mode="train"), expected)
    close(layer_features(net, x), z / np.sqrt(1 + 1e-5))
    assert not net[0].running_mean.any()
    # Two examples: one alone has no statistics, so the axis cannot be tried.
    assert layer_features(net, x[:2], mode="train").shape == (2, 3)


def test_compiled_and_half_precision_models():
    net, x = mlp(3, 4, 2).float(), inputs(4, 3).float()
    wrapped = nn.Sequential(torch.compile(net, backend="eager"))
    torch.testing.assert_close(
        layer_features(wrapped, x, layer="0.1"), layer_features(net, x)
    )
    assert layer_features(net.bfloat16(), x.bfloat16()).dtype == torch.float32


class Windows(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 1)

    def forward(self, x):
        return self.head(x.reshape(-1, 3)).reshape(len(x), -1)


X = torch.ones(4, 3)

REFUSED = [
    (mlp(3, 4, 2).float(), X, {"layer": "3"}, ValueError, "'3' is no layer.*0, 1, 2"),
    (mlp(3, 4, 2), X[:0], {}, ValueError, "no example"),
    (Residual(), X, {"layer": "unused"}, UnsupportedModelError, "does not call.*inner"),
    (ByHand(), X, {}, UnsupportedModelError, "calls no layer.*output_fn"),
    (Windows(), torch.ones(2, 5, 3), {}, UnsupportedModelError, "no axis of their own"),
    (
        nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)),
        X,
        {"output_fn": lambda net, x: functional.dropout(net(x), 0.5, training=True)},
        UnsupportedModelError,
        "random",
    ),
]


@pytest.mark.parametrize(("net", "x", "settings", "kind", "what"), REFUSED)
def test_what_cannot_be_told_is_refused(net, x, settings, kind, what):
    with pytest.raises(kind, match=what):
        layer_features(net, x, **settings)
    assert not any(part._forward_hooks for part in net.modules())

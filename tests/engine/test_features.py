"""Features and patterns against forward passes by hand, loops, and infinite width."""

import math
import pickle
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from ntk_callbacks import conjugate_kernel, layer_features, theory
from ntk_callbacks.engine.activation_patterns import (
    activation_patterns,
    pattern_change,
)
from ntk_callbacks.engine.gates import GATES
from ntk_callbacks.errors import UnsupportedModelError


def mlp(*widths, gate=nn.ReLU, seed=0):
    torch.manual_seed(seed)
    parts = []
    for d, width in pairwise(widths):
        parts += [nn.Linear(d, width), gate()]
    return nn.Sequential(*parts[:-1]).double()


def inputs(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def array(tensor):
    return tensor.detach().numpy().copy()


def by_hand(net, x):
    """Pre- and post-activations of a ReLU MLP, by loops over units."""
    layers = [part for part in net if isinstance(part, nn.Linear)]
    h, before, after = array(x), [], []
    for layer in layers[:-1]:
        w, b = array(layer.weight), array(layer.bias)
        z = np.empty((len(h), len(w)))
        for i, k in product(range(len(h)), range(len(w))):
            z[i, k] = b[k] + sum(w[k, j] * h[i, j] for j in range(w.shape[1]))
        h = np.where(z > 0, z, 0.0)
        before.append(z)
        after.append(h)
    return before, after


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


class ByHand(nn.Module):
    """Weights without layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.ones(4, 3))
        self.last = nn.Parameter(torch.ones(2, 4))

    def forward(self, x):
        return (x @ self.first.T).relu() @ self.last.T


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


# Patterns ---------------------------------------------------------------------------


def test_patterns_by_explicit_loops():
    """Share of flips and dead units, counted one by one; 33 bits do not fill bytes."""
    net, other, x = mlp(4, 11, 5, 2), mlp(4, 11, 5, 2, seed=3), inputs(3, 4)
    now, before = activation_patterns(net, x), activation_patterns(other, x)
    assert [*now] == ["1", "3"]
    flips = total = 0
    for name, z, w in zip(now, by_hand(net, x)[0], by_hand(other, x)[0], strict=True):
        own = sum(
            (z[i, k] > 0) != (w[i, k] > 0) for i, k in product(*map(range, z.shape))
        )
        assert now[name].changed(before[name]) == own
        dead = sum(not any(z[i, k] > 0 for i in range(3)) for k in range(z.shape[1]))
        assert now[name].dead == dead
        assert (now[name].size, now[name].units) == (z.size, z.shape[1])
        flips, total = flips + own, total + z.size
    assert 0 < flips < total
    assert pattern_change(now, before) == flips / total
    assert pattern_change(now, now) == 0
    assert now["1"].bits.shape == (1, 5)  # 33 bits
    assert pickle.loads(pickle.dumps(now))["1"].changed(before["1"]) > 0


def test_a_negated_first_layer_flips_every_activation_behind_it():
    net, x = mlp(4, 9, 2), inputs(5, 4)
    before = activation_patterns(net, x)
    net[0].weight.data.neg_()
    net[0].bias.data.neg_()
    assert pattern_change(activation_patterns(net, x), before) == 1


CALLS = {
    "relu": [functional.relu, torch.relu, torch.Tensor.relu, torch.relu_, nn.ReLU()],
    "relu6": [functional.relu6, nn.ReLU6()],
    "leaky_relu": [functional.leaky_relu, nn.LeakyReLU(inplace=True)],
    "prelu": [lambda x: torch.prelu(x, x.new_full((1,), 0.3)), nn.PReLU().double()],
    "rrelu": [functional.rrelu, nn.RReLU()],
    "hardtanh": [nn.Hardtanh(-1, 2, inplace=True), nn.Hardtanh(min_val=-1, max_val=2)],
    "hardsigmoid": [functional.hardsigmoid, nn.Hardsigmoid()],
    "threshold": [
        nn.Threshold(0.5, 0.0),
        lambda x: functional.threshold_(x, threshold=0.5, value=0.0),
    ],
    "hardshrink": [nn.Hardshrink(0.7), lambda x: x.hardshrink(lambd=0.7)],
    "softshrink": [nn.Softshrink(0.7), lambda x: functional.softshrink(input=x)],
}


class Gated(nn.Module):
    def __init__(self, gate):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()).double())
        self.gate = gate

    def forward(self, x):
        return self.gate(x * self.scale)


@pytest.mark.parametrize(
    ("kind", "call"), [(kind, call) for kind, calls in CALLS.items() for call in calls]
)
def test_pieces_of_every_gate_are_where_its_slope_changes(kind, call):
    """Flat where autograd finds slope 0; a crossing of any elbow is a change."""
    assert CALLS.keys() == GATES.keys()
    net = Gated(call).eval()
    # Steps across all elbows, each unit one example ahead of its neighbor.
    line = torch.linspace(-3.9, 7.1, 23, dtype=torch.float64)
    h = line.clone().requires_grad_()
    (slope,) = torch.autograd.grad(call(h.clone()).sum(), h)
    jumps = functional.pad((slope.diff() != 0), (1, 0)).cumsum(0)  # index of the piece
    (now,) = activation_patterns(net, line[None]).values()
    assert now.dead == (None if slope.all() else int((slope == 0).sum()))
    for shift in (1, 7):
        (moved,) = activation_patterns(net, line.roll(shift)[None]).values()
        assert now.changed(moved) == int((jumps != jumps.roll(shift)).sum())


def test_names_of_calls():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.act = nn.Linear(3, 3), nn.ReLU(inplace=True)
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            x = self.act(self.layer(x)) * self.scale.relu()
            return functional.relu(self.act(self.layer(x)) - 1)

    found = activation_patterns(nn.Sequential(Block(), nn.ReLU()), torch.ones(2, 3))
    # relu(scale) is no activation of an example.
    assert [*found] == ["0.act", "0.act.call2", "0.call2", "1"]
    assert [*activation_patterns(ByHand(), torch.ones(2, 3))] == ["ByHand"]
    encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    found = activation_patterns(encoder, torch.randn(2, 5, 4))  # no fused fast path
    assert {name: (p.size, p.units) for name, p in found.items()} == {
        "TransformerEncoderLayer": (80, 40)
    }
    assert not activation_patterns(mlp(3, 4, 2, gate=nn.Tanh), inputs(2, 3))


def test_patterns_of_different_gates_are_not_compared():
    x = inputs(2, 3)
    one, other = (activation_patterns(mlp(3, n, 2), x) for n in (4, 5))
    with pytest.raises(ValueError, match=r"gates \['1'\].*another number"):
        pattern_change(one, other)
    with pytest.raises(ValueError, match="not called"):
        pattern_change(one, {})

"""Signals and gradients by depth against loops written out by hand, in float64."""

import math

import numpy as np
import pytest
import torch
from networks import Computed
from signals import CLOSE, RNG, X, mean_cosine, mlp
from torch import nn
from torch.nn import functional

from ntk_callbacks import signal_statistics


def by_hand(net, x, output_gradient):
    """Forward and chain rule of a tanh network, example by example."""
    layers = [
        (m.weight.detach().numpy(), m.bias.detach().numpy())
        for m in net
        if isinstance(m, nn.Linear)
    ]
    signals = [[] for _ in layers]
    gradients = [[] for _ in layers]
    for i, a in enumerate(x):
        for depth, (w, b) in enumerate(layers):
            h = w @ a + b
            signals[depth].append(h)
            a = np.tanh(h)
        delta = output_gradient(signals[-1][i], i)
        gradients[-1].append(delta)
        for depth in range(len(layers) - 1, 0, -1):
            slope = 1 - np.tanh(signals[depth - 1][i]) ** 2
            delta = slope * (layers[depth][0].T @ delta)
            gradients[depth - 1].append(delta)
    return [np.array(h) for h in signals], [np.array(d) for d in gradients]


def check(found, signals, gradients):
    assert len(found.layers) == len(signals)
    assert found.q.tolist() == pytest.approx([(h**2).mean() for h in signals], **CLOSE)
    assert found.c.tolist() == pytest.approx([mean_cosine(h) for h in signals], **CLOSE)
    squares = [(d**2).mean() for d in gradients]
    assert found.gradient_square.tolist() == pytest.approx(squares, **CLOSE)
    sums = [(d**2).sum() for d in gradients]
    chi = [sums[i] / sums[i + 1] for i in range(len(sums) - 1)]
    assert found.chi.tolist() == pytest.approx(chi, **CLOSE)


def test_real_targets_against_the_chain_rule():
    net, y = mlp(5, 7, 6, 3), RNG.standard_normal((4, 3))
    signals, gradients = by_hand(net, X, lambda f, i: f - y[i])
    found = signal_statistics(net, torch.tensor(X), targets=torch.tensor(y))
    assert found.names == ("0", "2", "4")
    check(found, signals, gradients)


def test_class_targets_against_the_chain_rule():
    net, y = mlp(5, 7, 6, 3), [2, 0, 1, 1]

    def gradient(f, i):
        return np.exp(f) / np.exp(f).sum() - np.eye(3)[y[i]]

    signals, gradients = by_hand(net, X, gradient)
    found = signal_statistics(net, torch.tensor(X), targets=torch.tensor(y))
    check(found, signals, gradients)


def test_a_single_output_has_one_direction():
    net = mlp(5, 7, 6, 1)
    signals, gradients = by_hand(net, X, lambda f, i: np.ones(1))
    check(signal_statistics(net, torch.tensor(X)), signals, gradients)


def test_directions_are_of_unit_length_random_and_always_the_same():
    net = mlp(5, 3)
    found = signal_statistics(net, torch.tensor(X))
    assert found.layers[0].gradient_square == pytest.approx(1 / 3, **CLOSE)
    deep = mlp(5, 8, 3)
    torch.manual_seed(1)
    first = signal_statistics(deep, torch.tensor(X)).gradient_square
    torch.manual_seed(2)
    again = signal_statistics(deep, torch.tensor(X)).gradient_square
    assert torch.equal(first, again)
    # E_u |Jᵀu|² = |J|²/c: many examples that are all the same average over u.
    x = torch.tensor(X[:1]).expand(2_000, 5)
    h = deep[0](x[:1]).detach()
    jacobian = deep[2].weight.detach() * (1 - h.tanh() ** 2)
    mean = signal_statistics(deep, x).layers[0].gradient_square
    # 2000 directions scatter by less than 1/√2000 = 2.2 %.
    assert mean == pytest.approx(float(jacobian.square().sum() / 3 / 8), rel=0.06)


def test_convolutions_against_autograd_by_hand():
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.ReLU(inplace=True)),
        *(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(inplace=True)),
        *(nn.Flatten(), nn.Linear(54, 2)),
    ).double()
    x, y = torch.randn(4, 2, 6, 6).double(), torch.randn(4, 2).double()
    first = functional.conv2d(x, net[0].weight, net[0].bias, stride=2, padding=1)
    second = functional.conv2d(
        first.clamp(min=0), net[2].weight, net[2].bias, padding=1
    )
    last = second.clamp(min=0).flatten(1) @ net[5].weight.T + net[5].bias
    loss = ((last - y) ** 2).sum() / 2
    signals = [first, second, last]
    gradients = [d.numpy() for d in torch.autograd.grad(loss, signals)]
    found = signal_statistics(net, x, targets=y)
    assert [layer.units for layer in found.layers] == [36, 54, 2]
    check(found, [h.detach().numpy() for h in signals], gradients)


def test_a_layer_that_is_used_twice_counts_twice():
    net = Computed(
        lambda self, x: self.out(self.a(torch.tanh(self.a(x)))),
        a=nn.Linear(5, 5),
        out=nn.Linear(5, 1),
    ).double()
    net.same = net.a  # a second name for the same module
    flat = nn.Sequential(net.a, nn.Tanh(), nn.Linear(5, 5), nn.Identity(), net.out)
    flat[2] = nn.Linear(5, 5).double()
    flat[2].load_state_dict(net.a.state_dict())
    found = signal_statistics(net, torch.tensor(X))
    expected = signal_statistics(flat, torch.tensor(X))
    assert found.names == ("a", "a.call2", "out")
    for what in ("q", "c", "gradient_square", "chi"):
        assert torch.equal(getattr(found, what), getattr(expected, what))


def gaussian_moments(q, c):
    """E tanh(u)², E tanh(u) tanh(v), E tanh'(u)² by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()
    u = np.sqrt(q) * nodes
    square = (weights * np.tanh(u) ** 2).sum()
    slope = (weights * (1 - np.tanh(u) ** 2) ** 2).sum()
    v = np.sqrt(q) * (c * nodes[:, None] + np.sqrt(1 - c * c) * nodes)
    mixed = weights @ (np.tanh(u)[:, None] * np.tanh(v)) @ weights
    return square, mixed, slope


@pytest.mark.slow
def test_wide_random_networks_follow_the_maps():
    """Poole et al. 2016: q' = σ_w² E φ² + σ_b², c' likewise, χ = σ_w² E φ'²."""
    width, depth, w2, b2 = 1000, 8, 1.5**2, 0.05
    torch.manual_seed(0)
    x = torch.randn(2, width, dtype=torch.float64)
    x = x / x.square().mean(1, keepdim=True).sqrt()
    x[1] = 0.6 * x[0] + 0.8 * (x[1] - x[0] * (x[0] @ x[1]) / width)
    x[1] /= x[1].square().mean().sqrt()
    found = []
    for _ in range(10):
        net = mlp(*[width] * (depth + 1))
        torch.manual_seed(100 + len(found))
        for layer in net[::2]:
            nn.init.normal_(layer.weight, std=(w2 / width) ** 0.5)
            nn.init.normal_(layer.bias, std=b2**0.5)
        found.append(signal_statistics(net, x))
    q, c = w2 + b2, (w2 * float(x[0] @ x[1]) / width + b2) / (w2 + b2)
    for depth_, layer in enumerate(zip(*(s.layers for s in found), strict=True)):
        assert np.mean([s.q for s in layer]) == pytest.approx(q, rel=0.05)
        assert np.mean([s.c for s in layer]) == pytest.approx(c, abs=0.03)
        square, mixed, slope = gaussian_moments(q, c)
        if depth_ < depth - 1:
            chi = np.mean([float(s.chi[depth_]) for s in found])
            # √(2/1000) of each of 10 networks, and as much of the weights.
            assert chi == pytest.approx(w2 * slope, rel=0.05)
        q, c = w2 * square + b2, (w2 * mixed + b2) / (w2 * square + b2)


def test_widths_may_differ():
    """χ sums over outputs: a step from 2000 to 500 units keeps σ_w² E φ'²."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(5, 2000), nn.Linear(2000, 500), nn.Linear(500, 50))
    for layer in net.double():
        nn.init.normal_(layer.weight, std=1.3 / layer.in_features**0.5)
    x = torch.randn(64, 5, dtype=torch.float64)
    # 50 outputs of 64 examples: a few percent of scatter.
    assert signal_statistics(net, x).chi.tolist() == pytest.approx(
        [1.69, 1.69], rel=0.1
    )


# Where the examples are ----------------------------------------------------------


def test_channels_as_many_as_examples():
    net = nn.Sequential(nn.Conv1d(3, 4, 1), nn.Flatten(), nn.Linear(8, 1)).double()
    x = torch.randn(4, 3, 2, dtype=torch.float64)
    h = net[0](x).detach().numpy()
    assert signal_statistics(net, x).layers[0].c == pytest.approx(mean_cosine(h))


def test_examples_on_the_second_axis_beside_as_many_time_steps():
    layer = nn.Linear(3, 5)
    net = Computed(
        lambda self, x: self.layer(x.transpose(0, 1)).transpose(0, 1), layer=layer
    ).double()
    x = torch.randn(4, 4, 3, dtype=torch.float64)
    h = layer(x).detach().numpy()
    assert signal_statistics(net, x).layers[0].c == pytest.approx(mean_cosine(h))


def test_examples_merged_with_windows_have_no_correlation():
    net = Computed(
        lambda self, x: self.layer(x.flatten(0, 1)).view(4, 2, 5), layer=nn.Linear(3, 5)
    ).double()
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    free = Computed(lambda self, x: self.layer(x), layer=net.layer)
    (found,), (expected,) = (signal_statistics(m, x).layers for m in (net, free))
    assert math.isnan(signal_statistics(net, x).c[0])
    assert found.q == pytest.approx(expected.q)
    assert found.units == expected.units
    assert found.gradient_square == pytest.approx(expected.gradient_square)


def test_one_example_has_no_pair():
    found = signal_statistics(mlp(5, 6, 2), torch.tensor(X[:1]))
    assert found.c.isnan().all()
    assert found.q.isfinite().all()

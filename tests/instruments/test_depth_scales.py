"""Depth scales and the growth of gradients, fitted over the layers of a network."""

import math

import numpy as np
import pytest
import torch
from mean_field import NODES, WEIGHTS, expectation, measured, network
from torch import nn

from ntk_callbacks import Probe
from ntk_callbacks.instruments.signal import SignalInstrument
from ntk_callbacks.metrics.depth import depth_scale_fit


def test_depth_scales_are_fitted_to_all_but_the_last_layer():
    width = 400
    net = network(*[width] * 12, 3, scale=2.0, bias=0.05**0.5)
    x = (torch.randn(width) + 0.6 * torch.randn(8, width)).double()
    found = measured(net, x)
    fits = {
        what: depth_scale_fit(found.vectors[f"signal/{what}_by_depth"][:-1]).xi
        for what in ("q", "c")
    }
    assert found.scalars["signal/xi_q"] == fits["q"]
    assert found.scalars["signal/xi_c"] == fits["c"]
    # σ_w = 2: ξ_q = 0.87 and ξ_c = 6.98 close to the fixed point.
    assert 0.3 < fits["q"] < 3
    assert 3 < fits["c"] < 14
    inner = [layer.weight for layer in list(net)[2:-1:2]]
    w2 = np.mean([width * float(w.detach().square().mean()) for w in inner])
    xi_q, xi_c = depth_scales_of_tanh(w2, 0.05)
    predicted = found.scalars
    assert predicted["signal/xi_q_mean_field"] == pytest.approx(xi_q, rel=1e-5)
    assert predicted["signal/xi_c_mean_field"] == pytest.approx(xi_c, rel=1e-5)
    shallow = measured(network(6, 6, 6), torch.randn(4, 6).double()).scalars
    assert math.isnan(shallow["signal/xi_q"])
    assert math.isnan(shallow["signal/xi_c"])


def depth_scales_of_tanh(w2, b2):
    """−1/log of the slopes of both maps, by differences, where iterating them ends."""

    def variance(q):
        return w2 * float(WEIGHTS @ np.tanh(math.sqrt(q) * NODES) ** 2) + b2

    def correlation(c, q):
        return (w2 * expectation(np.tanh, q, q, c * q) + b2) / q

    q, c = 1.0, 0.5
    for _ in range(60):
        q = variance(q)
    for _ in range(300):
        c = correlation(c, q)
    slopes = (
        (variance(q + 1e-4) - variance(q - 1e-4)) / 2e-4,
        (correlation(c + 1e-4, q) - correlation(c - 1e-4, q)) / 2e-4,
    )
    return [-1 / math.log(slope) for slope in slopes]


def test_depth_scales_where_nothing_decays():
    """At its critical point ReLU keeps q, and c nears 1 as a power of the depth."""
    net = network(*[6] * 7, activation=nn.ReLU, orthogonal=True, scale=2**0.5)
    scalars = measured(net, torch.randn(4, 6).double()).scalars
    assert math.isnan(scalars["signal/xi_q_mean_field"])
    assert math.isnan(scalars["signal/xi_c_mean_field"])
    # χ = σ_w²/2 is the slope of both maps of ReLU at the fixed point q = σ_b²/(1 − χ).
    net = network(*[6] * 7, activation=nn.ReLU, orthogonal=True, bias=0.1, scale=1.0)
    scalars = measured(net, torch.randn(4, 6).double()).scalars
    expected = pytest.approx(1 / math.log(2), rel=1e-6)
    assert scalars["signal/xi_q_mean_field"] == expected
    assert scalars["signal/xi_c_mean_field"] == expected


def test_depth_scales_are_of_one_kind_of_layer():
    """Neither the first and the last layer nor two kinds of φ have an endless twin."""
    x = torch.randn(4, 6).double()
    mixed = network(6, 6, 6, 6, 6, scale=1.0)
    mixed[1] = nn.ReLU()
    for net in (mixed, network(6, 6, 6, scale=1.0)):
        scalars = measured(net, x).scalars
        assert math.isnan(scalars["signal/xi_q_mean_field"])
        assert math.isnan(scalars["signal/xi_c_mean_field"])
        assert not math.isnan(scalars["signal/q_mean_field_error"])


def test_growth_of_gradients_is_the_geometric_mean():
    net = network(6, 7, 5, 4)
    x = torch.randn(3, 6).double()
    found = measured(net, x)
    squares = found.vectors["signal/gradient_square_by_depth"].numpy()
    sums = squares * [7, 5, 4]
    assert found.scalars["signal/chi"] == pytest.approx((sums[0] / sums[-1]) ** 0.5)


def test_gradients_of_the_loss():
    net = network(6, 5, 3)
    x, y = torch.randn(4, 6).double(), torch.tensor([0, 2, 1, 1])
    found = measured(net, x, y, gradient_of="loss")
    gap = net(x).softmax(1) - torch.eye(3)[y]
    assert found.vectors["signal/gradient_square_by_depth"][-1] == pytest.approx(
        float(gap.detach().square().mean())
    )
    with pytest.raises(ValueError, match=r"needs targets.*gradient_of"):
        SignalInstrument(gradient_of="loss").start(Probe(x))

"""Patterns of gates against explicit loops, and where they are not compared."""

import pickle
from itertools import product

import pytest
import torch
from layers_by_hand import ByHand, by_hand, inputs, mlp
from torch import nn
from torch.nn import functional

from ntk_callbacks.engine.activation_patterns import activation_patterns, pattern_change
from ntk_callbacks.engine.gates import GATES


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

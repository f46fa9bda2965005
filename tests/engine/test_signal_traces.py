"""Measuring signals leaves no trace, and what cannot be measured is refused."""

import pytest
import torch
from networks import Computed
from signals import X, mlp
from torch import nn
from torch.nn import functional

from ntk_callbacks import signal_statistics
from ntk_callbacks.errors import UnsupportedModelError


def hooks(net):
    return [len(m._forward_hooks) for m in net.modules()]


def test_nothing_is_left_on_the_model():
    net, calls = mlp(5, 6, 2).train(), []
    net[0].register_forward_hook(lambda *_: calls.append(1))
    net[0].weight.grad = torch.ones_like(net[0].weight)
    before, generator = hooks(net), torch.get_rng_state()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    x = torch.tensor(X)
    signal_statistics(net, x)
    assert calls
    assert hooks(net) == before
    assert (net[0].weight.grad == 1).all()
    assert net[2].weight.grad is None
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert all(part.training for part in net.modules())


def test_hooks_go_when_a_forward_pass_fails():
    def forward(self, x):
        self.runs += 1
        x = self.layer(x)
        if self.layer._forward_hooks:
            raise ArithmeticError("in the middle")
        return x

    net = Computed(forward, layer=nn.Linear(5, 2), runs=0).double()
    with pytest.raises(ArithmeticError):
        signal_statistics(net, torch.tensor(X))
    assert hooks(net) == [0, 0]
    assert net.runs == 0


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_measured_where_gradients_are_off(context):
    net = mlp(5, 6, 2)
    expected = signal_statistics(net, torch.tensor(X))
    with context():
        found = signal_statistics(net, torch.tensor(X))
    assert torch.equal(found.gradient_square, expected.gradient_square)
    assert not found.layers[0].outputs.requires_grad


def test_what_is_refused():
    net, x = mlp(5, 6, 2), torch.tensor(X)
    with pytest.raises(ValueError, match="no example"):
        signal_statistics(net, x[:0])
    with pytest.raises(ValueError, match=r"layers='\['.*no regular expression"):
        signal_statistics(net, x, layers="[")
    with pytest.raises(UnsupportedModelError, match=r"layers='conv'.*made of 0"):
        signal_statistics(net, x, layers="conv")
    for targets in (
        torch.zeros(4, 3),
        torch.tensor([0, 1, 2, 1]),
        torch.ones(4).bool(),
    ):
        with pytest.raises(ValueError, match=r"targets of shape.*outputs \(4, 2\)"):
            signal_statistics(net, x, targets=targets)
    noisy = Computed(lambda self, x: functional.dropout(self.net(x)), net=net)
    with pytest.raises(UnsupportedModelError, match="draws random numbers"):
        signal_statistics(noisy, x)

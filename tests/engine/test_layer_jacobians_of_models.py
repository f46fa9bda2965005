"""Jacobians between the layers of models of all kinds, and what is refused."""

import copy
import math

import pytest
import torch
from layer_jacobians import agree, close, mlp, x_of
from networks import Computed
from odd_networks import checkpointed
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from ntk_callbacks.engine import segment_spectra
from ntk_callbacks.engine.layer_jacobians import (
    input_spectra,
    jacobian_by_depth,
    layer_jacobian,
)
from ntk_callbacks.errors import MemoryBudgetError, UnsupportedModelError


class Residual(nn.Module):
    """h2 = h1 + W₂ tanh h1: a branch goes around the second layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()

    def forward(self, x):
        h = self.first(x)
        return self.second(h + self.second(h.tanh()))


def test_branches_and_second_calls():
    torch.manual_seed(0)
    net, x = Residual(), x_of(3, 4)
    w = net.second.weight.detach()
    with torch.no_grad():
        d = torch.diag_embed(1 - net.first(x).tanh() ** 2)
    close(layer_jacobian(net, x, "first", "second"), w @ d)
    close(layer_jacobian(net, x, "first"), w @ (torch.eye(4) + w @ d))
    close(layer_jacobian(net, x, "second", "second.call2"), w.expand(3, 4, 4))
    assert jacobian_by_depth(net, x).names == ("first", "second", "second.call2")


def test_examples_that_depend_on_one_another_have_their_own_block(monkeypatch):
    """Batch statistics: a loop over single numbers of one graph."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    x = x_of(5, 3)
    h = net[0](x)
    out = net[2](functional.batch_norm(h, None, None, training=True))
    expected = torch.stack(
        [
            torch.stack(
                [torch.autograd.grad(v, h, retain_graph=True)[0][i] for v in out[i]]
            )
            for i in range(5)
        ]
    )
    close(layer_jacobian(net, x, "0", "2", mode="train"), expected)
    found = jacobian_by_depth(net, x, mode="train", count=2).step
    agree(found, [expected[:2]])
    monkeypatch.setattr(segment_spectra, "WIDEST_FORMED", 1)
    wide = jacobian_by_depth(net, x, mode="train", count=2).step
    torch.testing.assert_close(wide.largest, found.largest, rtol=1e-5, atol=0)
    torch.testing.assert_close(wide.smallest, found.smallest, rtol=1e-5, atol=0)


@pytest.mark.parametrize("count", [1, 2])
def test_the_first_examples_of_a_batch_that_depends_on_all_of_it(count):
    """h = x − (mean over n = 5): (1 − 1/5) on the diagonal, for those asked about."""
    net = Computed(
        lambda self, x: self.out(x - x.mean(0)), out=nn.Linear(3, 3)
    ).double()
    found = input_spectra(net, x_of(5, 3), count=count)
    s = 0.8 * torch.linalg.svdvals(net.out.weight.detach())
    expected = s[[0, -1], None, None].expand(2, 1, count)
    both = torch.stack([found.largest, found.smallest])
    torch.testing.assert_close(both, expected, rtol=1e-9, atol=0)


def test_examples_that_share_an_axis_are_run_one_by_one():
    """Two windows of each example along the batch axis, as in window attention."""
    torch.manual_seed(0)
    net = Computed(
        lambda self, x: self.out(self.inner(x.reshape(-1, 3)).tanh().reshape(-1, 8)),
        inner=nn.Linear(3, 4),
        out=nn.Linear(8, 2),
    ).double()
    x = x_of(3, 6)
    with torch.no_grad():
        h = net.inner(x.reshape(-1, 3)).reshape(3, 8)
    expected = net.out.weight.detach() @ torch.diag_embed(1 - h.tanh() ** 2)
    close(layer_jacobian(net, x, "inner", "out"), expected)
    agree(jacobian_by_depth(net, x).step, [expected])


def test_sequence_first_layers_have_the_examples_along_another_axis():
    torch.manual_seed(0)
    net = Computed(
        lambda self, x: self.out(self.inner(x.transpose(0, 1)).sum(0)),
        inner=nn.Linear(3, 4),
        out=nn.Linear(4, 2),
    ).double()
    x = x_of(3, 3, 3)  # as many steps as examples
    expected = net.out.weight.detach().repeat(1, 3).expand(3, 2, 12)
    close(layer_jacobian(net, x, "inner", "out"), expected)


def test_integer_inputs_start_from_their_embedding():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 3)).double()
    ids = torch.tensor([[0, 1], [2, 2]])
    close(layer_jacobian(net, ids, "0"), net[2].weight.detach().expand(2, 3, 8))
    found = jacobian_by_depth(net, ids, layers=(nn.Embedding, nn.Linear))
    assert found.from_input is None
    agree(found.step, [net[2].weight.detach().expand(2, 3, 8)])
    with pytest.raises(UnsupportedModelError, match="integers"):
        layer_jacobian(net, ids)


def test_what_autograd_does_not_see_is_nan():
    def forward(self, x):
        with torch.no_grad():
            h = self.first(x)
        return self.second(h)

    net = Computed(forward, first=nn.Linear(3, 3), second=nn.Linear(3, 3)).double()
    x = x_of(2, 3)
    assert layer_jacobian(net, x, "first", "second").isnan().all()
    found = jacobian_by_depth(net, x)
    assert found.step.largest.isnan().all()
    assert found.to_output.largest[0].isnan().all()
    assert (found.to_output.largest[1] - 1).abs().max() < 1e-12


def test_weights_gone_wrong_spoil_their_own_numbers_only():
    net, x = mlp(), x_of(2, 5)
    with torch.no_grad():
        net[0].weight.fill_(math.nan)
    found = jacobian_by_depth(net, x)
    assert found.from_input.largest.isnan().all()
    close(found.to_output.largest[2], torch.ones(2).double())


def test_models_are_left_as_they_were():
    net, x = mlp(), x_of(4, 5)
    net[4].requires_grad_(False)
    before = [p.clone() for p in net.parameters()]
    with torch.no_grad():
        found = layer_jacobian(net, x, "0", "4")
        jacobian_by_depth(net, x)
    assert not found.requires_grad
    assert all(map(torch.equal, before, net.parameters()))
    assert all(p.grad is None for p in net.parameters())
    assert [p.requires_grad for p in net.parameters()] == [True] * 4 + [False] * 2
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_looking_for_layers_moves_no_parametrization(mode):
    """In training, whoever reads a weight under a spectral norm moves its vectors."""
    net = nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3)
    ).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    before = copy.deepcopy(net.state_dict())
    measured = jacobian_by_depth(net, x, mode=mode)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    if mode == "eval":
        expected = jacobian_by_depth(copy.deepcopy(net).eval(), x)
        assert torch.equal(measured.to_output.largest, expected.to_output.largest)
        from_input = measured.from_input, expected.from_input
        assert torch.equal(*(part.largest for part in from_input))


def test_what_cannot_be_measured_is_said():
    net, x = mlp(), x_of(4, 5)
    with pytest.raises(ValueError, match="no module is called 'conv'; there are '0'"):
        layer_jacobian(net, x, "conv")
    with pytest.raises(ValueError, match=r"'0.call2' is not called; calls seen: '0'"):
        layer_jacobian(net, x, "0.call2")
    with pytest.raises(MemoryBudgetError, match="4 Jacobians of 3 × 7 numbers"):
        layer_jacobian(net, x, "0", memory_budget=4 * 3 * 7 * 8 - 1)
    with pytest.raises(ValueError, match="no example"):
        layer_jacobian(net, x[:0])
    with pytest.raises(ValueError, match="count=0"):
        jacobian_by_depth(net, x, count=0)
    with pytest.raises(UnsupportedModelError, match="no layer that is chosen"):
        jacobian_by_depth(net, x, layers="conv")
    with pytest.raises(UnsupportedModelError, match="reentrant"):
        jacobian_by_depth(checkpointed(True), torch.randn(2, 5))
    noisy = Computed(lambda self, x: functional.dropout(self.body(x)), body=mlp())
    with pytest.raises(UnsupportedModelError, match="draws random numbers"):
        layer_jacobian(noisy, x)

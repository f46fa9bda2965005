"""Columns or rows, shared or one at a time: products that layers are measured by."""

import pytest
import torch
from layer_jacobians import agree, close, x_of
from networks import Computed
from torch import nn

from ntk_callbacks.engine import segment_jacobians, segment_spectra
from ntk_callbacks.engine.layer_jacobians import jacobian_by_depth, layer_jacobian
from ntk_callbacks.engine.segments import Segment
from ntk_callbacks.errors import UnsupportedModelError


def test_more_outputs_than_inputs_go_by_columns():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 9), nn.Tanh(), nn.Linear(9, 30)).double()
    x = x_of(3, 2)
    with torch.no_grad():
        d = torch.diag_embed(1 - net[0](x).tanh() ** 2)
    w1, w2 = net[0].weight.detach(), net[2].weight.detach()
    close(layer_jacobian(net, x), w2 @ d @ w1)
    net[1] = OneWay()
    close(layer_jacobian(net, x), w2 @ d @ w1)


class Tanh(torch.autograd.Function):
    """A backward pass that is right, and that autograd cannot look into."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.tanh())
        return x.tanh()

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return (g.detach() * (1 - y**2)).detach()


class OneWay(nn.Module):
    def forward(self, x):
        return Tanh.apply(x)


def test_a_backward_pass_that_cannot_be_differentiated_is_not_believed(monkeypatch):
    net = nn.Sequential(nn.Linear(4, 6), OneWay(), nn.Linear(6, 6)).double()
    monkeypatch.setattr(segment_spectra, "WIDEST_FORMED", 1)
    with pytest.raises(UnsupportedModelError, match=r"custom autograd\.Function"):
        jacobian_by_depth(net, x_of(2, 4))


def from_input_by_hand(net, x, indices):
    """s of ∂h/∂x by one plain backward pass for each number of each example."""
    found = []
    for i in indices:
        rows = x.clone().requires_grad_()
        h = net[: i + 1](rows).flatten(1)
        parts = [
            torch.autograd.grad(h[:, k].sum(), rows, retain_graph=True)[0]
            for k in range(h.shape[1])
        ]
        s = torch.linalg.svdvals(torch.stack(parts, 1).flatten(2))
        found.append(torch.stack([s[:, 0], s[:, -1]]))
    return torch.stack(found, 1)


def extremes(found):
    return torch.stack([found.from_input.largest, found.from_input.smallest])


def test_layers_wider_than_the_input_share_products_with_its_columns(monkeypatch):
    net = nn.Sequential(
        *(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)),
    ).double()
    x = x_of(4, 3)
    expected = from_input_by_hand(net, x, (0, 2, 4))
    products = []
    times = Segment.times

    def counted(self, v):
        products.append(self.shape)
        return times(self, v)

    monkeypatch.setattr(Segment, "times", counted)
    monkeypatch.setattr(segment_jacobians, "_MOST_TOGETHER", 1)
    found = extremes(jacobian_by_depth(net, x))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    # Three columns and an audit, for all three layers, of 6 + 8 + 5 numbers, at once.
    assert products.count((19, 3)) == 4


def test_one_wrong_derivative_among_those_that_share_products():
    """The second tanh cannot be differentiated twice: columns behind it are wrong."""
    net = nn.Sequential(
        *(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 8), OneWay(), nn.Linear(8, 5)),
    ).double()
    with torch.no_grad():
        net[4].weight.mul_(1e-5)  # nothing beside the others, which are right
    x = x_of(4, 3)
    found = extremes(jacobian_by_depth(net, x))
    expected = from_input_by_hand(net, x, (0, 2, 4))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


class Stubborn(torch.autograd.Function):
    """Its backward pass looks at numbers, and tells the products of a batch apart."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g if g.abs().sum().item() >= 0 else g


class Sloppy(torch.autograd.Function):
    """Right for one product at a time; many at once reach it as one shape more."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        batched = torch._C._functorch.is_batchedtensor(g)
        return 3 * g if batched else 2 * g


@pytest.mark.parametrize("function", [Stubborn, Sloppy])
def test_backward_passes_that_take_one_product_at_a_time(function):
    net = nn.Sequential(
        nn.Linear(7, 6), Computed(lambda self, h: function.apply(h)), nn.Linear(6, 5)
    ).double()
    x = x_of(4, 7)
    found = jacobian_by_depth(net, x)
    expected = from_input_by_hand(net, x, (0, 2))
    torch.testing.assert_close(extremes(found), expected, rtol=1e-9, atol=1e-12)
    w = net[2].weight.detach()
    agree(found.step, [(2 * w).expand(4, 5, 6)])

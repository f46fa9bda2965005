"""Jacobians between layers against products of matrices written by hand."""

import copy
import math

import pytest
import torch
from cases import Computed, checkpointed
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from ntk_callbacks import input_jacobian
from ntk_callbacks.engine import segment_jacobians, segment_spectra
from ntk_callbacks.engine.layer_jacobians import (
    input_spectra,
    jacobian_by_depth,
    layer_jacobian,
)
from ntk_callbacks.engine.segments import Segment
from ntk_callbacks.errors import MemoryBudgetError, UnsupportedModelError

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def close(left, right):
    torch.testing.assert_close(left, right, **CLOSE)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.ReLU(inplace=True)),
        nn.Linear(6, 3),
    ).double()


def x_of(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def by_hand(net, x):
    """The three weights and the slopes of the activations, no derivative taken."""
    weights = [net[i].weight.detach() for i in (0, 2, 4)]
    with torch.no_grad():
        h1 = functional.linear(x, weights[0], net[0].bias)
        h2 = functional.linear(h1.tanh(), weights[1], net[2].bias)
    return (
        weights,
        torch.diag_embed(1 - h1.tanh() ** 2),
        torch.diag_embed((h2 > 0).double()),
    )


def test_multilayer_perceptron_is_a_product_of_matrices():
    net, x = mlp(), x_of(4, 5)
    (w1, w2, w3), d1, d2 = by_hand(net, x)
    products = {
        ("0", "2"): w2 @ d1,
        ("2", "4"): w3 @ d2,
        ("0", "4"): w3 @ d2 @ w2 @ d1,
        (None, "0"): w1.expand(4, 7, 5),
        (None, "2"): w2 @ d1 @ w1,
        ("0", None): w3 @ d2 @ w2 @ d1,
        (None, None): w3 @ d2 @ w2 @ d1 @ w1,
        ("4", None): torch.eye(3).double().expand(4, 3, 3),
    }
    for (start, end), expected in products.items():
        close(layer_jacobian(net, x, start, end), expected)
    close(layer_jacobian(net, x), input_jacobian(net, x))
    assert not layer_jacobian(net, x, "4", "0").any()  # nothing leads backwards


def s_of(matrices):
    s = torch.linalg.svdvals(matrices)
    return s.square().mean(1), s[:, 0], s[:, -1]


def agree(spectra, matrices):
    for found, expected in zip(
        (spectra.mean_square, spectra.largest, spectra.smallest),
        zip(*(s_of(m) for m in matrices), strict=True),
        strict=True,
    ):
        close(found, torch.stack(expected))


def test_singular_values_by_depth():
    net, x = mlp(), x_of(4, 5)
    (w1, w2, w3), d1, d2 = by_hand(net, x)
    found = jacobian_by_depth(net, x)
    assert found.names == ("0", "2", "4")
    agree(found.step, [w2 @ d1, w3 @ d2])
    agree(found.from_input, [w1.expand(4, 7, 5), w2 @ d1 @ w1, w3 @ d2 @ w2 @ d1 @ w1])
    agree(
        found.to_output,
        [w3 @ d2 @ w2 @ d1, w3 @ d2, torch.eye(3).double().expand(4, 3, 3)],
    )
    assert found.step.formed.all()
    s = torch.linalg.svdvals(w2 @ d1)
    close(found.step.condition_number[0], s[:, 0] / s[:, -1])
    gram = (w2 @ d1) @ (w2 @ d1).mT
    scale = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    gap = torch.linalg.matrix_norm(gram / scale - torch.eye(6), ord=2)
    close(found.step.isometry_gap[0], gap)
    few = jacobian_by_depth(net, x, count=2)
    close(few.step.largest, found.step.largest[:, :2])
    chosen = jacobian_by_depth(net, x, layers="[04]")
    agree(chosen.step, [w3 @ d2 @ w2 @ d1])


def dense(convolution, *shape):
    """The matrix of a convolution, column by column: it is linear, no derivative."""
    units = torch.eye(math.prod(shape)).double().reshape(-1, *shape)
    with torch.no_grad():
        return (convolution(units) - convolution(0 * units)).flatten(1).mT


@pytest.fixture
def images():
    torch.manual_seed(2)
    net = nn.Sequential(
        *(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 2, stride=2)),
        *(nn.Flatten(), nn.Linear(16, 2)),
    ).double()
    return net, x_of(3, 2, 4, 4)


def test_convolutions_are_their_dense_matrices(images):
    net, x = images
    with torch.no_grad():
        slopes = torch.diag_embed((1 - net[0](x).tanh() ** 2).flatten(1))
    first, second = dense(net[0], 2, 4, 4), dense(net[2], 3, 4, 4)
    close(layer_jacobian(net, x, "0", "2"), second @ slopes)
    close(layer_jacobian(net, x, None, "2"), second @ slopes @ first)
    agree(
        jacobian_by_depth(net, x).step,
        [second @ slopes, net[4].weight.expand(3, 2, 16)],
    )


def test_wide_layers_agree_with_their_formed_jacobians(images, monkeypatch):
    net, x = images
    exact = jacobian_by_depth(net, x)
    monkeypatch.setattr(segment_spectra, "WIDEST_FORMED", 1)
    wide = jacobian_by_depth(net, x)
    assert not wide.step.formed.any()
    for one, other in ((wide.step, exact.step), (wide.to_output, exact.to_output)):
        torch.testing.assert_close(one.largest, other.largest, rtol=1e-5, atol=0)
        torch.testing.assert_close(one.smallest, other.smallest, rtol=1e-5, atol=1e-12)
        # 16 vectors: √(2/16r) of scatter, r = 2 for the narrowest.
        torch.testing.assert_close(one.mean_square, other.mean_square, rtol=0.5, atol=0)
    torch.testing.assert_close(
        wide.step.mean_square[0], exact.step.mean_square[0], rtol=0.2, atol=0
    )
    assert wide.from_input.largest.isnan().all()
    torch.testing.assert_close(
        wide.from_input.mean_square, exact.from_input.mean_square, rtol=0.5, atol=0
    )


def test_estimates_of_the_mean_square_have_no_bias(monkeypatch):
    monkeypatch.setattr(segment_spectra, "WIDEST_FORMED", 1)
    monkeypatch.setattr(segment_spectra, "_SAMPLES", 400)
    net, x = mlp(), x_of(2, 5)
    (w1, w2, _), d1, _ = by_hand(net, x)
    exact = (w2 @ d1 @ w1).square().sum((1, 2)) / 5
    # √(2/400) = 7 % at most, less for more than one direction.
    found = input_spectra(net[:3], x).mean_square[0]
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0)


def test_orthogonal_networks_are_isometries_however_wide(monkeypatch):
    torch.manual_seed(0)
    layers = [nn.Linear(40, 40, bias=False).double() for _ in range(3)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, gain=1.5)
    net, x = nn.Sequential(*layers), x_of(3, 40)
    for widest in (256, 4):
        monkeypatch.setattr(segment_spectra, "WIDEST_FORMED", widest)
        found = jacobian_by_depth(net, x)
        assert found.step.isometry_gap.abs().max() < 1e-10
        assert (found.step.largest - 1.5).abs().max() < 1e-10
        assert (found.to_output.smallest[0] - 1.5**2).abs().max() < 1e-10
        assert input_spectra(net, x).isometry_gap.abs().max() < 1e-10


def test_a_smallest_value_that_is_not_found_is_nan(monkeypatch):
    monkeypatch.setattr(segment_spectra, "WIDEST_FORMED", 4)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300)).double()
    step = jacobian_by_depth(net, x_of(2, 300)).step
    assert step.smallest.isnan().all()
    assert step.isometry_gap.isnan().all()
    s = torch.linalg.svdvals(net[1].weight)[0].detach()
    torch.testing.assert_close(step.largest, s.expand(1, 2), rtol=1e-5, atol=0)


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

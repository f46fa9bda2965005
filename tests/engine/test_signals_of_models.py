"""Signals of models of all kinds: which layers, which scales, which gradients."""

import math

import pytest
import torch
from networks import Computed
from signals import CLOSE, X, mean_cosine, mlp
from torch import nn
from torch.utils.checkpoint import checkpoint

from ntk_callbacks import signal_statistics
from ntk_callbacks.errors import UnsupportedModelError
from ntk_callbacks.experiments import layers as reference


def test_layers_are_chosen_by_pattern_type_or_predicate():
    net = mlp(5, 7, 6, 3)
    x = torch.tensor(X)
    assert signal_statistics(net, x, layers="[02]").names == ("0", "2")
    assert signal_statistics(net, x, layers=nn.Tanh).names == ("1", "3")
    assert len(signal_statistics(net, x, layers=(nn.Tanh, nn.Linear)).layers) == 5

    def last(name, module):
        return name == "4"

    assert signal_statistics(net, x, layers=last).names == ("4",)


def test_frozen_half_precision_tokens_and_mappings():
    embedded = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 2))
    embedded.requires_grad_(False).bfloat16()
    ids = torch.arange(6).reshape(3, 2)
    found = signal_statistics(embedded, ids)
    expected = signal_statistics(embedded.double(), ids)
    assert found.q.tolist() == pytest.approx(expected.q.tolist(), rel=1e-5)
    assert found.gradient_square[0] == pytest.approx(0.5)
    net = Computed(lambda self, a, b: {"logits": self.l(a + b)}, l=nn.Linear(5, 2))
    x = torch.tensor(X)
    found = signal_statistics(net.double(), {"a": x, "b": x})
    assert found.q.tolist() == signal_statistics(net.l, 2 * x).q.tolist()


def test_recurrent_layers_are_named_and_can_be_asked_for():
    net = Computed(lambda self, x: self.rnn(x)[0], rnn=nn.GRU(3, 4, batch_first=True))
    x = torch.randn(5, 6, 3)
    with pytest.raises(UnsupportedModelError, match=r"rnn \(GRU\).*layers=nn\.GRU"):
        signal_statistics(net, x)
    hidden = net.rnn(x)[0].detach().double()
    found = signal_statistics(net, x, layers=nn.GRU)
    assert found.q.tolist() == pytest.approx([float(hidden.square().mean())], rel=1e-6)
    assert found.c.tolist() == pytest.approx([mean_cosine(hidden.numpy())], rel=1e-5)
    assert math.isnan(found.layers[0].sigma_w)
    cell = Computed(lambda self, x: self.cell(x)[0], cell=nn.LSTMCell(3, 4))
    with pytest.raises(UnsupportedModelError, match=r"'cell' \(LSTMCell\).*2 floating"):
        signal_statistics(cell, x[:, 0], layers=nn.LSTMCell)


def test_layers_that_are_not_called():
    net = nn.MultiheadAttention(4, 2, batch_first=True)
    body = Computed(lambda self, x: self.mix(x, x, x)[0], mix=net)
    with pytest.raises(UnsupportedModelError, match="calls no layer that is chosen"):
        signal_statistics(body, torch.randn(3, 2, 4))


def test_gradients_that_do_not_flow():
    def forward(self, x):
        with torch.no_grad():
            x = self.frozen(x)
        self.aside(x)
        return self.head(x)

    parts = {name: nn.Linear(5, 5) for name in ("frozen", "aside", "head")}
    net = Computed(forward, **parts).double()
    found = signal_statistics(net, torch.tensor(X), layers="")
    gradients = found.gradient_square.tolist()
    assert gradients == pytest.approx([math.nan, 0.0, 0.2], nan_ok=True)
    assert found.q.isfinite().all()
    assert signal_statistics(net, torch.tensor(X)).names == ("frozen", "head")


@pytest.mark.parametrize("first", [0, 1])
def test_another_head_is_not_in_the_chain(first):
    """It is called, but no output depends on it: χ of it would be infinite."""
    trunk, heads = nn.Linear(5, 4), [nn.Linear(4, 3), nn.Linear(4, 2)]

    def forward(self, x):
        h = torch.tanh(self.trunk(x))
        found = {i: self.heads[i](h) for i in (first, 1 - first)}
        return found[0], found[1]

    net = Computed(forward, trunk=trunk, heads=nn.ModuleList(heads)).double()
    x = torch.tensor(X)
    found = signal_statistics(net, x, output_fn=lambda net, x: net(x)[0])
    assert found.names == ("trunk", "heads.0")
    alone = signal_statistics(nn.Sequential(trunk, nn.Tanh(), heads[0]), x)
    assert torch.equal(found.chi, alone.chi)
    assert torch.equal(found.q, alone.q)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpoints():
    inner = mlp(5, 5, 5)

    def model(reentrant):
        return Computed(
            lambda self, x: self.out(
                checkpoint(self.inner, x, use_reentrant=reentrant)
            ),
            inner=inner,
            out=nn.Linear(5, 1).double(),
        )

    net = model(False)
    found = signal_statistics(net, torch.tensor(X))
    plain = signal_statistics(nn.Sequential(inner, net.out), torch.tensor(X))
    assert found.names == ("inner.0", "inner.2", "out")
    for what in ("q", "c", "gradient_square", "chi"):
        assert torch.equal(getattr(found, what), getattr(plain, what))
    x = torch.tensor(X, requires_grad=True)
    with pytest.raises(UnsupportedModelError, match="use_reentrant=False"):
        signal_statistics(nn.Sequential(nn.Linear(5, 5).double(), model(True)), x)


def test_batch_statistics_in_train_mode():
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    with torch.no_grad():
        net[1].running_var.fill_(9.0)
    x = torch.tensor(X)
    found = signal_statistics(net, x, mode="train")
    h = net[0](x).detach()
    normed = (h - h.mean(0)) / (h.var(0, unbiased=False) + net[1].eps).sqrt()
    assert found.q[1] == pytest.approx(float(net[2](normed).detach().square().mean()))
    assert (net[1].running_var == 9.0).all()
    assert signal_statistics(net, x).q[1] != pytest.approx(float(found.q[1]))


@pytest.mark.parametrize("parametrization", ["standard", "ntk"])
def test_scales_are_those_in_use_in_either_parametrization(parametrization):
    torch.manual_seed(0)
    scales = {"sigma_w": 1.5, "sigma_b": 0.3, "parametrization": parametrization}
    net = nn.Sequential(
        *(reference.Conv2d(2, 5, 3, **scales), nn.ReLU(), nn.Flatten()),
        reference.Linear(80, 6, **scales),
    ).double()
    found = signal_statistics(net, torch.randn(3, 2, 4, 4)).layers
    for layer, module, fan_in in zip(found, (net[0], net[3]), (18, 80), strict=True):
        w, b = module.weight.detach().square(), module.bias.detach().square()
        ntk = parametrization == "ntk"
        sigma_w = (w.mean() * (1.5**2 if ntk else fan_in)).sqrt()
        sigma_b = b.mean().sqrt() * (0.3 if ntk else 1)
        assert layer.sigma_w == pytest.approx(float(sigma_w), rel=1e-10)
        assert layer.sigma_b == pytest.approx(float(sigma_b), rel=1e-10)


def test_layers_that_hold_their_weight_the_other_way_round():
    """`Conv1D` of transformers, of which GPT-2 is made, is a linear layer."""
    from transformers.pytorch_utils import Conv1D

    plain = mlp(5, 7, 7, 3)
    turned = nn.Sequential(Conv1D(7, 5), nn.Tanh(), Conv1D(7, 7), nn.Tanh(), plain[4])
    turned = turned.double()
    with torch.no_grad():
        for index in (0, 2):
            turned[index].weight.copy_(plain[index].weight.T)
            turned[index].bias.copy_(plain[index].bias.uniform_(-1, 1))
    found, expected = (signal_statistics(m, torch.tensor(X)) for m in (turned, plain))
    assert found.names == expected.names == ("0", "2", "4")
    for layer, same in zip(found.layers, expected.layers, strict=True):
        for name in ("q", "c", "gradient_square", "units", "sigma_w", "sigma_b"):
            assert getattr(layer, name) == pytest.approx(getattr(same, name), **CLOSE)


def test_scales_of_what_is_no_plain_layer_are_unknown():
    class Adapter(nn.Linear):
        def forward(self, x):
            return super().forward(x) + x.flip(1)

    found = signal_statistics(Adapter(5, 5).double(), torch.tensor(X)).layers[0]
    assert math.isnan(found.sigma_w)
    assert math.isnan(found.sigma_b)
    found = signal_statistics(nn.ConvTranspose1d(2, 3, 2), torch.randn(2, 2, 4))
    assert math.isnan(found.layers[0].sigma_w)
    found = signal_statistics(nn.Linear(5, 5, bias=False).double(), torch.tensor(X))
    assert found.layers[0].sigma_b == 0.0


def test_nan_weights_give_nan():
    net = mlp(5, 6, 2)
    with torch.no_grad():
        net[0].weight[0, 0] = torch.nan
    found = signal_statistics(net, torch.tensor(X))
    assert found.q.isnan().all()
    assert found.c.isnan().all()

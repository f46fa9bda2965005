"""Signals and gradients by depth against loops written out by hand, in float64."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from cases import Computed
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ntk_callbacks import signal_statistics
from ntk_callbacks.errors import UnsupportedModelError
from ntk_callbacks.experiments import layers as reference

RNG = np.random.default_rng(5)
X = RNG.standard_normal((4, 5))
CLOSE = {"rel": 1e-10, "abs": 1e-13}


def mlp(*widths, activation=nn.Tanh):
    torch.manual_seed(0)
    parts = []
    for d, width in pairwise(widths):
        parts += [nn.Linear(d, width), activation()]
    return nn.Sequential(*parts[:-1]).double()


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


def mean_cosine(h):
    h = h.reshape(len(h), -1)
    found = []
    for i in range(len(h)):
        for j in range(i):
            norm = math.sqrt((h[i] @ h[i]) * (h[j] @ h[j]))
            found.append((h[i] @ h[j]) / norm)
    return np.mean(found)


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


# Models of all kinds -------------------------------------------------------------


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


# No trace, and what is refused ---------------------------------------------------


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

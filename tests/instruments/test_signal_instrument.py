"""Scalars by depth of networks that are known on paper, beside mean-field maps."""

import math

import numpy as np
import pytest
import torch
from mean_field import (
    CLOSE,
    NODES,
    PLAIN,
    THEORY,
    WEIGHTS,
    expectation,
    measured,
    names,
    network,
)
from torch import nn
from torch.nn import functional

from ntk_callbacks import Probe
from ntk_callbacks.instruments.signal import SignalInstrument


def test_isometries_obey_the_maps_exactly():
    """h' = σ Q h: covariances and squared gradients are multiplied by σ²."""
    net = network(*[6] * 5, activation=nn.Identity, orthogonal=True, scale=1.2)
    x = torch.randn(5, 6).double()
    found = measured(net, x)
    assert found.step == 7
    first = 1.44 * float(x.square().mean())
    c = float(functional.cosine_similarity(x[:, None], x[None], dim=-1).sum() - 5) / 20
    scalars = found.scalars
    assert scalars["signal/q_first"] == pytest.approx(first, **CLOSE)
    assert scalars["signal/q_last"] == pytest.approx(1.44**3 * first, **CLOSE)
    assert scalars["signal/c_first"] == pytest.approx(c, **CLOSE)
    assert scalars["signal/c_last"] == pytest.approx(c, **CLOSE)
    assert scalars["signal/chi"] == pytest.approx(1.44, **CLOSE)
    assert scalars["signal/q_mean_field_error"] == pytest.approx(0, abs=1e-12)
    assert scalars["signal/c_mean_field_error"] == pytest.approx(0, abs=1e-12)
    vectors = {k: v.tolist() for k, v in found.vectors.items()}
    q = [first * 1.44**depth for depth in range(4)]
    assert vectors["signal/q_by_depth"] == pytest.approx(q, **CLOSE)
    predicted = [math.nan, *q[1:]]
    assert vectors["signal/q_mean_field_by_depth"] == pytest.approx(
        predicted, nan_ok=True, **CLOSE
    )
    assert vectors["signal/chi_by_depth"] == pytest.approx([1.44] * 3, **CLOSE)
    assert vectors["signal/chi_mean_field_by_depth"] == pytest.approx(
        [1.44] * 3, **CLOSE
    )
    assert len(vectors["signal/c_by_depth"]) == 4
    assert vectors["signal/gradient_square_by_depth"] == pytest.approx(
        [1.44**k / 6 for k in (3, 2, 1, 0)], **CLOSE
    )


def test_predictions_are_one_application_of_the_maps():
    net = network(6, 7, 5, bias=0.3)
    x = torch.randn(3, 6).double()
    h = net[0](x).detach().numpy()
    covariance = h @ h.T / 7
    w2 = 7 * float(net[2].weight.detach().square().mean())
    b2 = 0.09
    predicted = np.empty((3, 3))
    for i in range(3):
        for j in range(3):
            q12 = covariance[i, j] if i != j else covariance[i, i] * (1 - 1e-15)
            mixed = expectation(np.tanh, covariance[i, i], covariance[j, j], q12)
            predicted[i, j] = w2 * mixed + b2
    q = predicted.diagonal().mean()
    root = np.sqrt(predicted.diagonal())
    c = (predicted / root / root[:, None])[np.triu_indices(3, 1)].mean()
    slopes = [
        WEIGHTS @ (1 - np.tanh(math.sqrt(v) * NODES) ** 2) ** 2
        for v in covariance.diagonal()
    ]
    found = measured(net, x)
    vectors = {k: v.tolist() for k, v in found.vectors.items()}
    assert vectors["signal/q_mean_field_by_depth"][1] == pytest.approx(q, rel=1e-6)
    assert vectors["signal/c_mean_field_by_depth"][1] == pytest.approx(c, abs=1e-6)
    assert vectors["signal/chi_mean_field_by_depth"] == pytest.approx(
        [w2 * np.mean(slopes)], rel=1e-6
    )
    real = net(x).detach().numpy()
    off = abs((real**2).mean() / q - 1)
    assert found.scalars["signal/q_mean_field_error"] == pytest.approx(off, rel=1e-5)
    norms = np.linalg.norm(real, axis=1)
    cosines = (real @ real.T / norms / norms[:, None])[np.triu_indices(3, 1)]
    assert found.scalars["signal/c_mean_field_error"] == pytest.approx(
        abs(cosines.mean() - c), rel=1e-5
    )


@pytest.mark.parametrize(
    "activation",
    [nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.Sigmoid, nn.ELU, nn.Softplus],
)
def test_activations_are_recognized(activation):
    net = network(200, 200, 200, activation=activation).float()
    found = measured(net, torch.randn(4, 200))
    assert names(found) == PLAIN | THEORY
    # √(2/200) of the scatter of q, weights of the one layer and its inputs.
    assert found.scalars["signal/q_mean_field_error"] < 0.2
    assert found.scalars["signal/c_mean_field_error"] < 0.1


def test_activations_of_ones_own():
    class Cubic(nn.Module):
        def forward(self, x):
            return cubic(x)

    def cubic(x):
        return x + 0.1 * x**3

    net = network(30, 30, 30, activation=Cubic)
    x = torch.randn(4, 30).double()
    assert names(measured(net, x)) == PLAIN
    assert names(measured(net, x, activation="tanh")) == PLAIN  # it is another
    found = measured(net, x, activation=cubic)
    assert names(found) == PLAIN | THEORY
    with pytest.raises(ValueError, match="expected one of relu"):
        SignalInstrument(activation="cubic")
    with pytest.raises(ValueError, match="not elementwise"):
        SignalInstrument(activation=lambda x: x.softmax(-1))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        h = self.first(x)
        h = h + self.second(h.tanh())
        return self.third(h.tanh())


def test_maps_are_taken_only_where_nothing_else_lies_between():
    found = measured(Residual().double(), torch.randn(4, 6).double())
    q = found.vectors["signal/q_mean_field_by_depth"].isfinite().tolist()
    assert q == [False, True, False]
    pooled = nn.Sequential(
        *(nn.Conv1d(1, 3, 3), nn.ReLU(), nn.AvgPool1d(2), nn.Conv1d(3, 3, 2)),
        *(nn.BatchNorm1d(3), nn.ReLU(), nn.Flatten(), nn.Linear(6, 2)),
    )
    with torch.no_grad():
        pooled[4].weight.fill_(2.0)
    assert names(measured(pooled, torch.randn(4, 1, 8))) == PLAIN


def test_numbers_of_every_layer_on_request():
    net = nn.ModuleDict({"a b": nn.Linear(6, 5), "out": nn.Linear(5, 2)}).double()
    x, y = torch.randn(4, 6).double(), torch.randn(4, 2).double()
    found = measured(
        net,
        x,
        y,
        output_fn=lambda m, x: m["out"](m["a b"](x).tanh()),
        gradient_of="loss",
        per_layer=True,
        name="signal/x",
    ).scalars
    h = net["a b"](x).detach().requires_grad_()
    f = net["out"](h.tanh())
    (by_h,) = torch.autograd.grad((f - y).square().sum() / 2, [h])
    ratio = by_h.square().sum() / (f - y).square().sum()
    expected = {"chi/a_b": ratio.item()}
    for layer, signal, gradient in (("a_b", h, by_h), ("out", f, f - y)):
        cosines = functional.cosine_similarity(signal[:, None], signal[None], dim=-1)
        expected |= {
            f"q/{layer}": signal.square().mean().item(),
            f"c/{layer}": (cosines.sum().item() - 4) / 12,
            f"gradient_square/{layer}": gradient.square().mean().item(),
        }
    layers = {
        tag.removeprefix("signal/x_layers/"): value
        for tag, value in found.items()
        if tag.startswith("signal/x_layers/")
    }
    assert layers == pytest.approx(expected, **CLOSE)


def test_curves_of_theory_neither_come_nor_go():
    """φ that is found first and lost later leaves NaN; the reverse leaves nothing."""
    plain = network(4, 5, 3)
    x = torch.randn(6, 4).double()
    broken = nn.Sequential(plain[0], nn.Tanh(), nn.BatchNorm1d(5).double(), plain[2])
    broken[2].running_mean.fill_(0.3)
    for first, then in [(plain, broken), (broken, plain)]:
        instrument = SignalInstrument()
        instrument.start(Probe(x))
        resumed = SignalInstrument()
        resumed.start(Probe(x))
        start = instrument.measure(first, 0)
        resumed.load_state_dict(instrument.state_dict())
        for later in (instrument.measure(then, 1), resumed.measure(then, 1)):
            assert names(later) == names(start)
            assert later.vectors.keys() == start.vectors.keys()
        known = first is plain
        assert (names(start) >= THEORY) == known
        if known:
            assert math.isfinite(start.scalars["signal/q_mean_field_error"])
            assert math.isnan(later.scalars["signal/q_mean_field_error"])


def test_a_single_layer_and_a_single_example():
    found = measured(nn.Linear(4, 2).double(), torch.randn(1, 4).double()).scalars
    assert names_of_nan(found) == {"c_first", "c_last", "chi", "xi_q", "xi_c"}
    net = network(6, 6, 6)
    found = measured(net, torch.randn(1, 6).double()).scalars
    assert math.isnan(found["signal/c_mean_field_error"])
    assert math.isfinite(found["signal/q_mean_field_error"])


def names_of_nan(scalars):
    return {tag.removeprefix("signal/") for tag, v in scalars.items() if math.isnan(v)}


@pytest.mark.parametrize("value", [math.nan, 1e200, 0.0])
def test_weights_gone_wrong_are_measured_all_the_same(value):
    net = network(6, 6, 6)
    with torch.no_grad():
        net[0].weight.fill_(value)
    found = measured(net, torch.randn(4, 6).double())
    assert set(PLAIN) <= names(found)


def test_start_comes_first():
    instrument = SignalInstrument()
    with pytest.raises(RuntimeError, match=r"call start\(probe\) first"):
        instrument.measure(nn.Linear(2, 2), 0)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"mode": "test"}, "mode='test'.*eval, train"),
        ({"gradient_of": "inputs"}, "gradient_of='inputs'.*outputs, loss"),
        ({"layers": "["}, r"layers='\['.*no regular expression"),
        ({"layers": 7}, "layers=7.*no regular expression"),
        ({"layers": (nn.Linear, 3)}, "no regular expression"),
        ({"output_fn": 3}, "output_fn must be callable"),
        ({"name": "my signal"}, "part of tags"),
    ],
)
def test_arguments_are_checked_at_once(settings, what):
    with pytest.raises(ValueError, match=what):
        SignalInstrument(**settings)

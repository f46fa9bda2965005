"""Steps and losses that cannot be predicted: what is refused, and what it is told."""

import pytest
import torch
from instrumented import LABELS, network
from predictions import probe, trained
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as yes_or_no
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import SGD

from ntk_callbacks import Probe
from ntk_callbacks.errors import ProbeError, UnsupportedModelError
from ntk_callbacks.instruments.prediction import PredictionInstrument
from ntk_callbacks.instruments.probe_loss import _suggestion


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"loss_fn": 3}, "callable"),
        ({"loss_fn": mse_loss, "per_class": True}, "Leave out one"),
        ({"mode": "test"}, "mode='test'"),
        ({"output_fn": "f"}, "output_fn must be callable"),
        ({"name": "a b"}, "part of tags"),
        ({"memory_budget": "much"}, "much"),
    ],
)
def test_bad_arguments(settings, what):
    with pytest.raises(ValueError, match=what):
        PredictionInstrument(**settings)


def test_measure_needs_a_probe():
    with pytest.raises(RuntimeError, match="start"):
        PredictionInstrument().measure(network(), 0)


@pytest.mark.parametrize("settings", [{"loss_fn": mse_loss}, {"per_class": True}])
def test_loss_without_targets_is_refused(settings):
    with pytest.raises(ProbeError, match="no targets"):
        PredictionInstrument(**settings).start(probe(None))


def test_labels_that_are_no_outputs():
    instrument = PredictionInstrument()
    instrument.start(probe(LABELS + 1))
    with pytest.raises(ProbeError, match=r"from 1 to 3 for 3 outputs; expected 0 … 2"):
        instrument.measure(network(), 0)


def test_real_targets_do_not_say_what_loss_is_trained():
    instrument = PredictionInstrument()
    instrument.start(probe(torch.zeros(5, 3)))
    with pytest.warns(UserWarning, match="only outputs are compared. Pass loss_fn"):
        assert instrument.measure(network(), 0).scalars == {}
    assert instrument.measure(network(), 1).scalars == {}  # said once
    shapeless = PredictionInstrument()
    shapeless.start(probe(torch.zeros(5, 2, dtype=torch.long)))
    with pytest.warns(UserWarning, match=r"Pass loss_fn=lambda outputs, targets: …"):
        assert shapeless.measure(network(), 0).scalars == {}
    single, net = PredictionInstrument(), nn.Sequential(network(), nn.Linear(3, 1))
    single.start(probe(torch.zeros(5)))
    with pytest.warns(UserWarning, match=r"\(outputs.view_as\(targets\), targets\)"):
        assert single.measure(net.double(), 0).scalars == {}
    strict = PredictionInstrument(per_class=True)
    strict.start(probe(torch.zeros(5, 3)))
    with pytest.raises(ProbeError, match="Leave it out"):
        strict.measure(network(), 0)


def test_weights_that_a_forward_pass_rewrites_do_not_count_against_the_step():
    tokens = Probe(torch.arange(5), LABELS)
    net = nn.Sequential(nn.Embedding(5, 3, max_norm=0.5), nn.Linear(3, 3)).double()
    sgd, instrument = SGD(net.parameters(), 1.0), PredictionInstrument()
    instrument.start(tokens)
    cross_entropy(net(tokens.inputs), LABELS).backward()
    instrument.predict(net, sgd, 1)
    sgd.step()
    assert net[0].weight.norm(dim=1).max() > 0.5
    assert instrument.measure(net, 1).scalars["prediction/step_error"] == 0.0


@pytest.mark.parametrize(
    ("shape", "labels", "expected"),
    [
        ((3, 2, 4), (3, 4), lambda f, y: cross_entropy(f, y)),
        ((3, 4, 2), (3, 4), lambda f, y: cross_entropy(f.transpose(1, 2), y)),
        ((3, 2, 4, 5), (3, 4, 5), lambda f, y: cross_entropy(f, y)),
        ((3, 1), (3,), lambda f, y: yes_or_no(f[:, 0], y.double())),
        ((3, 2), (3, 2), lambda f, y: yes_or_no(f, y.double())),
        ((3, 4, 4), (3, 4), None),  # may be either
        ((3, 4), (2,), None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.long, torch.uint8])
def test_the_loss_that_is_suggested_fits_the_labels(shape, labels, expected, dtype):
    f = torch.randn(shape, dtype=torch.float64)
    y = (torch.rand(labels) > 0.5).to(dtype)
    text = _suggestion(y, f)
    if expected is None:
        assert "…, the loss that is trained" in text
    else:
        found = eval(text.removesuffix(", or yours"))(f, y)
        assert found.item() == pytest.approx(expected(f, y.long()).item())
    if y.numel() != f.numel():  # real numbers are no labels
        assert "…, the loss that is trained" in _suggestion(y.double(), f)


@pytest.mark.parametrize(
    ("loss_fn", "what"),
    [(lambda f, y: f - y, r"\(5, 3\)"), (lambda f, y: 1.0, "float")],
)
def test_loss_that_is_not_one_number(loss_fn, what):
    instrument = PredictionInstrument(loss_fn=loss_fn)
    instrument.start(probe(torch.zeros(5, 3)))
    with pytest.raises(ValueError, match=f"returned {what}; expected one number"):
        instrument.measure(network(), 0)


def test_optimizers_that_need_a_closure_are_refused():
    net = network()
    trained(net, SGD(net.parameters(), 0.1), steps=0)
    instrument = PredictionInstrument()
    instrument.start(probe())
    with pytest.raises(UnsupportedModelError, match=r"LBFGS.*without a closure"):
        instrument.predict(net, torch.optim.LBFGS(net.parameters()), 1)


def test_optimizer_of_another_model_is_refused():
    net = network()
    with pytest.raises(UnsupportedModelError, match="no parameter of this Sequential"):
        PredictionInstrument().predict(net, SGD(network().parameters(), 0.1), 1)

"""The changes of outputs and loss that a predicted step makes on the probe."""

import pytest
import torch
from instrumented import LABELS, batch, network
from predictions import probe, trained
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam

from ntk_callbacks.instruments.prediction import PredictionInstrument


def test_classes_add_up():
    net = network()
    optimizer = Adam(net.parameters(), 0.03)
    trained(net, optimizer)
    labels = torch.tensor([0, 2, -100, 2, 0])  # cross-entropy leaves out -100
    instrument = PredictionInstrument(per_class=True)
    instrument.start(probe(labels))
    instrument.predict(net, optimizer, 1)
    before = net(probe().inputs)
    optimizer.step()
    found = instrument.measure(net, 1).scalars
    for part in ("actual", "optimizer", "gradient_flow"):
        shares = [found[f"prediction_classes/loss_change_{part}/{k}"] for k in (0, 2)]
        assert sum(shares) == pytest.approx(found[f"prediction/loss_change_{part}"])
        assert f"prediction_classes/loss_change_{part}/1" not in found
    after = net(probe().inputs)
    terms = [
        cross_entropy(f[[0, 4]], torch.zeros(2).long()) / 2 for f in (before, after)
    ]
    expected = float((terms[1] - terms[0]).detach())
    actual = found["prediction_classes/loss_change_actual/0"]
    assert actual == pytest.approx(expected)


@pytest.mark.parametrize("frozen", [False, True])
def test_step_of_rate_zero(frozen):
    """A warm-up begins with it: nothing moves, which is no failure."""
    net = network()
    if frozen:
        net[0].requires_grad_(False)
    optimizer = SGD(net.parameters(), 0.0)
    trained(net, optimizer, steps=0)
    instrument = PredictionInstrument()
    instrument.start(probe())
    instrument.predict(net, optimizer, 1)
    optimizer.step()
    found = instrument.measure(net, 1).scalars
    assert found["prediction/loss_change_actual"] == 0.0
    assert found["prediction/loss_change_optimizer"] == 0.0
    assert found["prediction/step_error"] == 0.0
    assert found["prediction/explained"] != found["prediction/explained"]


def test_only_the_loss_where_nothing_was_predicted():
    net = network()
    optimizer = SGD(net.parameters(), 0.1)
    trained(net, optimizer, steps=0)
    instrument = PredictionInstrument()
    instrument.start(probe())
    expected = pytest.approx(float(cross_entropy(net(probe().inputs), LABELS).detach()))
    assert instrument.measure(net, 0).scalars == {"prediction/loss": expected}
    instrument.predict(net, optimizer, 1)  # of an update that is not measured
    assert instrument.measure(net, 2).scalars == {"prediction/loss": expected}


def test_outputs_alone_without_targets():
    net = network()
    optimizer = SGD(net.parameters(), 1e-3)
    trained(net, optimizer, steps=0)
    instrument = PredictionInstrument(output_fn=lambda model, x: model(x)[:, :1])
    instrument.start(probe(None))
    instrument.predict(net, optimizer, 1)
    optimizer.step()
    with pytest.warns(UserWarning, match=r"no targets.*Probe\(inputs, targets\)"):
        found = instrument.measure(net, 1).scalars
    names = {"output_cosine", "output_error", "step_error"}
    assert {*found} == {f"prediction/{name}" for name in names}
    assert found["prediction/output_cosine"] > 0.999
    assert instrument.changes.actual.shape == (5, 1)


def test_loss_gets_the_outputs_in_their_own_shape():
    """A target (n,) against outputs (n, 1) would silently become (n, n)."""
    seen = []

    class Volume(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 6).double()

        def forward(self, x):
            return self.linear(x).view(-1, 2, 3)

    def loss(f, y):
        seen.append((f.shape, f.dtype, y.dtype))
        return (f - y).square().sum()

    net = Volume()
    optimizer = SGD(net.parameters(), 1e-3)
    net(batch(0)[0]).square().sum().backward()
    instrument = PredictionInstrument(loss_fn=loss)
    instrument.start(probe(torch.zeros(5, 2, 3)))
    instrument.predict(net, optimizer, 1)
    optimizer.step()
    assert instrument.measure(net, 1).scalars["prediction/explained"] > 0.9
    assert {*seen} == {((5, 2, 3), torch.float64, torch.float64)}
    assert instrument.changes.optimizer.shape == (5, 6)

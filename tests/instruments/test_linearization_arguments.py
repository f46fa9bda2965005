"""Linearized networks that cannot be: what is refused, and what it is told."""

import math

import pytest
import torch
from instrumented import LABELS, batch, inputs, network
from linearizations import measured
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim import SGD

from ntk_callbacks import Probe
from ntk_callbacks.errors import ProbeError, ProbeMismatchError, UnsupportedModelError
from ntk_callbacks.instruments.linearization import LinearizationInstrument
from ntk_callbacks.instruments.linearization_options import LinearizationOptions


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"threshold": -1.0}, "threshold=-1.0"),
        ({"ridge": math.inf}, "ridge=inf"),
        ({"mode": "test"}, "mode='test'"),
        ({"name": "linear theory"}, "name='linear theory'"),
        ({"memory_budget": "many"}, "many"),
    ],
)
def test_options_are_checked(settings, what):
    with pytest.raises(ValueError, match=what):
        LinearizationOptions(**settings)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="loss_fn must be callable"):
        LinearizationInstrument(loss_fn="mse")
    with pytest.raises(ValueError, match="output_fn"):
        LinearizationInstrument(output_fn=3)
    with pytest.raises(ValueError, match='held_out is not for mode="train"'):
        LinearizationInstrument(
            held_out=Probe(torch.eye(3)), options=LinearizationOptions(mode="train")
        )
    with pytest.raises(RuntimeError, match=r"call start\(probe\) first"):
        LinearizationInstrument().measure(network(), 0)
    with pytest.raises(ProbeError, match="no targets to take a loss of"):
        LinearizationInstrument(loss_fn=mse_loss).start(Probe(torch.eye(3)))


@pytest.mark.parametrize(
    ("probe", "held_out", "what"),
    [
        (Probe(torch.eye(3)), Probe(torch.eye(3), LABELS[:3]), "the probe has targets"),
        (Probe(torch.eye(3), LABELS[:3]), Probe(torch.eye(3)), "held_out has targets"),
        (Probe(torch.eye(3), LABELS[:3]), Probe(torch.eye(3), torch.eye(3)), "(3, 3)"),
        (
            Probe((torch.eye(3),), LABELS[:3]),
            Probe((torch.eye(3), None, torch.eye(3)), LABELS[:3]),
            "of the same shape",
        ),
    ],
)
def test_held_out_examples_need_labels_and_the_same_shapes(probe, held_out, what):
    instrument = LinearizationInstrument(
        held_out=held_out,
        output_fn=lambda model, x: model(x if torch.is_tensor(x) else x[0]),
    )
    instrument.start(probe)
    with pytest.raises(ProbeError, match=what.replace("(", r"\(").replace(")", r"\)")):
        instrument.measure(network().float(), 0)


def test_other_probes_and_other_parameters_are_refused():
    net, probe = network(), Probe(inputs(5, 9), LABELS)
    instrument = LinearizationInstrument()
    instrument.start(probe)
    instrument.measure(net, 0)
    instrument.start(Probe(inputs(5, 9), LABELS))
    with pytest.raises(ProbeMismatchError, match="other examples"):
        instrument.start(Probe(inputs(5, 8), LABELS))
    net.append(nn.Linear(3, 3))
    with pytest.raises(UnsupportedModelError, match=r"3\.bias.*not those of the first"):
        instrument.measure(net, 1)


def test_random_networks_are_refused_at_once():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x + torch.randn_like(x))

    instrument = LinearizationInstrument()
    instrument.start(Probe(torch.eye(3), LABELS[:3]))
    with pytest.raises(UnsupportedModelError, match="random"):
        instrument.measure(Noisy(3, 3), 0)
    assert instrument.point is None


def test_what_a_twin_needs():
    net, x, y = network(), *batch(0)
    instrument = LinearizationInstrument(twin=True)
    instrument.start(Probe(x, y))
    instrument.measure(net, 0)
    twin, point = instrument.twin, instrument.point
    with pytest.raises(RuntimeError, match="call expand"):
        twin.accumulate(net, x, y)
    with pytest.raises(UnsupportedModelError, match=r"LBFGS.*without a closure"):
        twin.expand(net, torch.optim.LBFGS(net.parameters()), point)
    twin.expand(net, SGD(net.parameters(), 0.1), point)
    with pytest.raises(UnsupportedModelError, match=r"loss.*not known.*loss_fn"):
        twin.accumulate(net, x, x)
    with pytest.raises(UnsupportedModelError, match="cannot tell the targets"):
        twin.accumulate(net, x, None)


def test_a_probe_without_targets_is_told_of_once():
    net, instrument = network(), LinearizationInstrument()
    instrument.start(Probe(inputs(5, 9)))
    with pytest.warns(UserWarning, match=r"LinearizationMonitor: .*no targets") as told:
        found = [measured(instrument, net, step) for step in range(2)]
    assert len(told) == 1
    assert not any("loss" in name for scalars in found for name in scalars)


def test_targets_that_are_no_labels_are_told_of_once():
    net = network()
    instrument = LinearizationInstrument()
    instrument.start(Probe(inputs(5, 9), inputs(5, 8)))
    with pytest.warns(UserWarning, match="only outputs are compared") as caught:
        found = [measured(instrument, net, step) for step in range(3)]
    assert len(caught) == 1
    assert found[2].keys() == {"output_distance", "parting_step"}

"""Linearized networks against Jacobians by rows."""

import copy
import math

import pytest
import torch
from instrumented import LABELS, flat, inputs, network
from linearizations import jacobian_by_rows, measured, normalized
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from ntk_callbacks import Probe
from ntk_callbacks.instruments.linearization import LinearizationInstrument
from ntk_callbacks.instruments.linearization_options import LinearizationOptions


def moved(net, by=0.3):
    """Weights and buffers somewhere else."""
    generator = torch.Generator().manual_seed(5)
    for tensor in [*net.parameters(), *net.buffers()]:
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
            tensor.data += by * noise
    return net


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("make", [network, normalized])
@pytest.mark.parametrize("loss_fn", [None, mse_loss])
def test_every_number_against_the_jacobian_by_rows(make, mode, loss_fn):
    net, x = make().train(), inputs(5, 9)
    targets = LABELS if loss_fn is None else inputs(5, 8)
    start = copy.deepcopy(net).train(mode == "train")
    options = LinearizationOptions(mode=mode, threshold=1e-3)
    instrument = LinearizationInstrument(loss_fn=loss_fn, options=options)
    instrument.start(Probe(x, targets))
    first = measured(instrument, net, 0)
    moved(net)
    before = copy.deepcopy(net.state_dict())
    found = measured(instrument, net, 7)

    now = copy.deepcopy(net).train(mode == "train")
    change = flat(net.parameters()) - flat(start.parameters())
    f, f0 = now(x).detach(), start(x).detach()
    linear = f0 + (jacobian_by_rows(start, x) @ change).view(5, 3)
    loss = loss_fn or cross_entropy
    expected = {
        "output_distance": float((f - linear).norm() / (f - f0).norm()),
        "loss": float(loss(f, targets)),
        "loss_gap": float(loss(linear, targets) - loss(f, targets)),
        "parting_step": 7.0,
    }
    if loss_fn is None:
        agree = [
            int(a.argmax()) == int(b.argmax()) for a, b in zip(f, linear, strict=True)
        ]
        expected["agreement"] = sum(agree) / 5
    assert found == pytest.approx(expected, rel=1e-9)
    assert 0.01 < found["output_distance"] < 3
    assert first == pytest.approx(
        {**dict.fromkeys(expected, math.nan), "loss": float(loss(f0, targets))}
        | {"loss_gap": 0.0}
        | ({"agreement": 1.0} if loss_fn is None else {}),
        nan_ok=True,
    )
    assert net.training
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_agreement_counts_examples():
    """f = θ x with x = 1: f_lin is exact; outputs θ² part at chosen examples."""

    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = nn.Parameter(torch.tensor([[2.0, 1.0], [1.0, 2.0], [3.0, 1]]))

        def forward(self, x):
            return x @ self.theta.square()

    net, probe = Square(), Probe(torch.eye(3), torch.tensor([0, 1, 0]))
    instrument = LinearizationInstrument()
    instrument.start(probe)
    instrument.measure(net, 0)
    # θ² and θ₀² + 2θ₀Δ order the outputs of the first and third example otherwise.
    net.theta.data = torch.tensor([[-3.0, 1.5], [1.0, 3.0], [-2.0, 0.0]])
    f = net.theta.detach().square()
    linear = torch.tensor([[4.0 - 20, 1 + 1], [1, 4 + 4], [9 - 30, 1 - 2]])
    found = measured(instrument, net)
    assert found["agreement"] == pytest.approx(1 / 3)
    assert found["loss_gap"] == pytest.approx(
        float(
            cross_entropy(linear.double(), probe.targets)
            - cross_entropy(f.double(), probe.targets)
        ),
        rel=1e-6,
    )


def test_linear_networks_never_part():
    net = nn.Linear(3, 3).double()
    instrument = LinearizationInstrument(options=LinearizationOptions(threshold=1e-9))
    instrument.start(Probe(inputs(5, 9), LABELS))
    instrument.measure(net, 0)
    moved(net)
    found = measured(instrument, net)
    assert found["output_distance"] < 1e-14
    assert abs(found["loss_gap"]) < 1e-14
    assert found["agreement"] == 1.0
    assert math.isnan(found["parting_step"])


@pytest.mark.parametrize("share", [0.99, 1.01])
def test_parting_step_is_the_first_beyond_the_threshold(share):
    ways = [0.01, 0.05, 0.3, 0.01]

    def measurements(threshold):
        net = network()
        options = LinearizationOptions(threshold=threshold)
        instrument = LinearizationInstrument(options=options)
        instrument.start(Probe(inputs(5, 9), LABELS))
        instrument.measure(net, 0)
        start = copy.deepcopy(net.state_dict())
        for step, by in enumerate(ways, start=1):
            net.load_state_dict(start)
            yield measured(instrument, moved(net, by), 10 * step)

    distances = [found["output_distance"] for found in measurements(0.0)]
    assert distances[0] == distances[3] < distances[1] < distances[2]
    parted = [found["parting_step"] for found in measurements(share * distances[1])]
    first = 1 if share < 1 else 2  # the second measurement, or the third
    assert all(math.isnan(step) for step in parted[:first])
    assert parted[first:] == [10.0 * (first + 1)] * (4 - first)


def test_half_precision_weights_move_in_full():
    net = nn.Linear(3, 3).bfloat16()
    instrument = LinearizationInstrument()
    instrument.start(Probe(torch.eye(3), LABELS[:3]))
    instrument.measure(net, 0)
    net.weight.data += 0.5
    assert measured(instrument, net)["output_distance"] < 1e-6

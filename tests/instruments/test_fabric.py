"""Instruments in a loop of Lightning Fabric: its wrapper changes no number."""

import pytest
import torch
from lightning.fabric import Fabric
from monitored import copied, generator_states, same, seeded
from torch import nn
from torch.nn.functional import cross_entropy

from ntk_callbacks import LinearizationOptions, NTKOptions, Probe
from ntk_callbacks.instruments.features import FeatureInstrument
from ntk_callbacks.instruments.jacobian import JacobianInstrument
from ntk_callbacks.instruments.kernel import KernelInstrument
from ntk_callbacks.instruments.linearization import LinearizationInstrument
from ntk_callbacks.instruments.parameters import ParameterDriftInstrument
from ntk_callbacks.instruments.prediction import PredictionInstrument
from ntk_callbacks.instruments.signal import SignalInstrument

PROBE = Probe(torch.linspace(-1, 1, 15).reshape(5, 3) ** 3, torch.arange(5) % 2)
STEPS = 4


def instruments(mode):
    return [
        KernelInstrument(options=NTKOptions(mode=mode), by="module"),
        ParameterDriftInstrument(),
        JacobianInstrument(mode=mode),
        SignalInstrument(mode=mode, per_layer=True),
        FeatureInstrument(mode=mode),
        PredictionInstrument(mode=mode),
        LinearizationInstrument(options=LinearizationOptions(mode=mode)),
    ]


def loop(precision, measured, mode="eval", through_wrapper=True):
    """Step -> scalars; and all that training leaves."""
    fabric = Fabric(accelerator="cpu", precision=precision)
    seeded()
    net = nn.Sequential(
        *(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh()),
        *(nn.Dropout(0.3), nn.Linear(4, 2)),
    )
    model, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters(), lr=0.05))
    watched = model if through_wrapper else net
    used = instruments(mode) if measured else []
    for instrument in used:
        instrument.start(PROBE)
    rows = {}
    for step in range(STEPS + 1):
        for instrument in used:
            found = instrument.measure(watched, step)
            rows.setdefault(step, {}).update(found.scalars)
        x = torch.randn(6, 3)
        optimizer.zero_grad()
        fabric.backward(cross_entropy(model(x), torch.arange(6) % 2))
        for instrument in used:
            if isinstance(instrument, PredictionInstrument):
                instrument.predict(watched, optimizer.optimizer, step + 1)
        optimizer.step()
    left = {
        "weights": copied(net.state_dict()),
        "gradients": copied([p.grad for p in net.parameters()]),
        "optimizer": copied(optimizer.state_dict()),
        # Python's own moves where types are checked at run time, as in these tests.
        "generators": generator_states()[1:],
        "training": [part.training for part in model.modules()],
        "attributes": [sorted(vars(part)) for part in model.modules()],
    }
    return rows, left


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_wrapped_modules_measure_as_bare_ones_and_train_as_if_alone(precision, mode):
    wrapped, left = loop(precision, True, mode)
    bare, _ = loop(precision, True, mode, through_wrapper=False)
    _, alone = loop(precision, False)
    assert [*wrapped] == [*range(STEPS + 1)]
    assert {
        *("ntk/trace", "params/displacement", "jacobian/mean_square", "signal/chi"),
        *("features/cka_to_init", "prediction/loss_change_actual"),
        *("linear/output_distance", "ntk_modules/trace/4"),
        *("signal_layers/q/0", "params_tensors/displacement/0.weight"),
    } <= {*wrapped[STEPS]}
    same(wrapped, bare)
    same(left, alone)


def test_foretold_steps_are_those_the_optimizer_takes():
    rows, _ = loop("bf16-mixed", True)
    assert all(rows[step]["prediction/step_error"] == 0 for step in range(1, STEPS + 1))

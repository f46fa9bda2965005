"""Weights and numbers that are not finite, or zero, are told as they are."""

import math

import pytest
from lightning.pytorch import Callback
from monitored import Plain, fit, same, seeded
from torch import nn

from ntk_callbacks import JacobianMonitor, NTKMonitor, ParameterDriftMonitor


class Poison(Callback):
    """A training that diverges."""

    def __init__(self, value):
        self.value = value

    def on_train_batch_start(self, trainer, pl_module, *_):
        if trainer.global_step == 3:
            pl_module.net[0].weight.data.fill_(self.value)


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_weights_that_are_not_finite(value):
    """Mode 20: decompositions raise on NaN; curves show it, the run goes on."""
    monitors = [
        NTKMonitor(4, 2, on_error="raise"),
        ParameterDriftMonitor(2, on_error="raise"),
        JacobianMonitor(4, 2, on_error="raise"),
    ]
    seeded()
    run = fit(Plain(), [*monitors, Poison(value)])
    measured = run.recorder.measured()
    assert [*measured] == [0, 2, 4, 6, 8]
    assert {len(row) for row in measured.values()} == {len(measured[0])}
    for tag in ("ntk/trace", "ntk/relative_change", "ntk/condition_number"):
        assert math.isfinite(measured[2][tag])
        assert not math.isfinite(measured[4][tag]), tag
    assert not math.isfinite(measured[4]["params/displacement"])
    assert not math.isfinite(measured[4]["jacobian/singular_value_max"])
    seeded()
    same(run.trace(), fit(Plain(), [Poison(value)]).trace())


@pytest.mark.filterwarnings("ignore:.*invalid value.*:RuntimeWarning")
def test_weights_that_are_not_finite_in_tensorboard(tmp_path):
    """Mode 12: histograms of NaN alone raise in TensorBoard."""
    from lightning.pytorch.loggers import TensorBoardLogger

    monitors = [NTKMonitor(4, 2, on_error="raise"), JacobianMonitor(4, 2)]
    run = fit(
        Plain(), [*monitors, Poison(math.nan)], logger=TensorBoardLogger(tmp_path)
    )
    assert run.trainer.global_step == 8
    assert [step for step, _ in monitors[0].history] == [0, 2, 4, 6, 8]


def test_model_that_starts_at_zero():
    class Zero(Plain):
        def __init__(self):
            super().__init__()
            for parameter in self.parameters():
                nn.init.zeros_(parameter)

    monitors = [
        NTKMonitor(4, 2, on_error="raise"),
        ParameterDriftMonitor(2, on_error="raise"),
        JacobianMonitor(4, 2, on_error="raise"),
    ]
    assert [*fit(Zero(), monitors).recorder.measured()] == [0, 2, 4, 6, 8]

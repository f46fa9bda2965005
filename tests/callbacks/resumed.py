"""Runs with every monitor: one without a break, others interrupted and resumed."""

from functools import cache

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint
from monitored import Plain, Recorder, fit, loader, same, seeded
from torch import nn
from torch.nn.functional import cross_entropy

from ntk_callbacks import (
    FeatureMonitor,
    JacobianMonitor,
    LinearizationMonitor,
    NTKMonitor,
    NTKOptions,
    ParameterDriftMonitor,
    PredictionMonitor,
    Probe,
    SignalMonitor,
)

RESUMED_ANYWHERE = [
    # Mid-epoch checkpoints are what is tested here.
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended"),
    # Lightning looks for what an OnExceptionCheckpoint saved before.
    pytest.mark.filterwarnings("ignore:.*ckpt_path=None.. was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
    # The resumed run has no ModelCheckpoint.
    pytest.mark.filterwarnings("ignore:Be aware.*add the following.*ModelCheckpoint"),
]

LAST = 12  # updates, 4 in an epoch


class Repeatable(Plain):
    """Trains on data made from the step, so that a resumed loader does not matter."""

    def __init__(self):
        super().__init__(
            nn.Sequential(
                nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)
            )
        )

    def training_step(self, batch, batch_idx):
        generator = torch.Generator().manual_seed(self.global_step)
        x = torch.randn(6, 3, generator=generator)
        loss = cross_entropy(self(x), torch.arange(6) % 2)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", cross_entropy(self(batch[0]), batch[1]))


class Fatal(Callback):
    """Ends the run in the middle of an update."""

    def __init__(self, step, error=RuntimeError):
        self.step, self.error = step, error

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            raise self.error("the power went out")


SCHEDULES = {
    1: range(LAST + 1),
    5: [0, 5, 10, LAST],
    "epoch": [0, 4, 8, LAST],
    "5 per decade": [0, 1, 2, 3, 4, 6, 10, LAST],
}


def monitors(every):
    """One of each kind in one run: their tags do not meet."""
    held_out = Probe(torch.linspace(-1, 1, 12).reshape(4, 3), torch.arange(4) % 2)
    return [
        NTKMonitor(
            *(5, every),
            by="module",
            metrics="all",
            options=NTKOptions(loss="cross_entropy_mean"),  # of labels of its own
            on_error="raise",
        ),
        ParameterDriftMonitor(every, on_error="raise"),
        JacobianMonitor(5, every, on_error="raise"),
        SignalMonitor(5, every, per_layer=True, on_error="raise"),
        FeatureMonitor(5, every, on_error="raise"),
        PredictionMonitor(5, every, on_error="raise"),
        LinearizationMonitor(5, every, held_out=held_out, on_error="raise"),
    ]


def run(callbacks, recorder=None, **settings):
    seeded()
    return fit(
        Repeatable(),
        list(callbacks),
        logger=Recorder() if recorder is None else recorder,
        enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks),
        **({"max_steps": LAST, "val": loader(3)} | settings),
    )


@cache
def unbroken(every):
    recorder = Recorder()
    run(monitors(every), recorder)
    measured = recorder.measured()
    assert [*measured] == [*SCHEDULES[every]]
    # Nothing was foretold of the start, nor had anything changed.
    later = [{*row} for step, row in measured.items() if step > 0]
    assert all({*measured[0]} <= tags == later[0] for tags in later)
    assert len(measured[0]) > 20
    return measured


@cache
def bare_weights():
    return run([]).model.state_dict()


def interrupted(every, step, saver, error=RuntimeError):
    """What a run logs that dies before the update after `step`."""
    recorder = Recorder()
    with pytest.raises((error, SystemExit)):
        run([*monitors(every), Fatal(step, error), saver], recorder)
    return recorder.measured()


def resumed(every, checkpoint, **settings):
    recorder = Recorder()
    last = run(monitors(every), recorder, ckpt_path=str(checkpoint), **settings)
    assert last.trainer.global_step == LAST
    same(last.model.state_dict(), bare_weights())
    return recorder.measured()


def check_curves(every, before, after, saved):
    """Old and new together are the unbroken curve; nothing is measured twice."""
    expected = unbroken(every)
    assert [*after] == [step for step in expected if step > saved]
    for rows in (before, after):
        for step, row in rows.items():
            same(row, expected[step], f"step {step}")

"""However a run ends, its last step is measured; what is no training is not."""

import time
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, Timer
from measured_steps import drift, steps_of
from monitored import Plain, Recorder, Validated, fit, loader, same, seeded
from torch.utils.data import DataLoader, IterableDataset


class StopAt(Callback):
    """Asks Lightning to stop after an update, as many callbacks do."""

    def __init__(self, step, hook="on_train_batch_end"):
        self.step = step
        setattr(self, hook, self.stop)

    def stop(self, trainer, *_):
        if trainer.global_step >= self.step:
            trainer.should_stop = True


@pytest.mark.parametrize("schedule", ["epoch", 4, 100])
@pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])
@pytest.mark.parametrize(
    ("stop", "hook", "settings", "last"),
    [
        (6, "on_train_batch_end", {}, 6),
        (4, "on_train_batch_end", {}, 4),
        (4, "on_train_epoch_end", {}, 4),
        (8, "on_train_epoch_end", {"max_epochs": 9}, 8),
        (2, "on_train_batch_end", {"min_epochs": 2, "max_epochs": 9}, 8),
        (2, "on_train_batch_end", {"min_steps": 7, "max_epochs": 9}, 7),
        (4, "on_validation_end", {}, 4),
    ],
)
def test_stopped_early(stop, hook, settings, last, first, schedule):
    """Whoever stops the run, from whichever hook: the last step is measured, once."""
    settings = {"max_epochs": 3, "val": loader(3)} | settings
    stopper = StopAt(stop, hook)
    order = {"before": [stopper]} if first else {"after": [stopper]}
    steps = steps_of(schedule, Validated(), **order, **settings)
    due = [s for s in range(1, last) if isinstance(schedule, int) and s % schedule == 0]
    due = [4] * (last > 4) if schedule == "epoch" else due
    assert steps == [0, *due, last]


@pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])
@pytest.mark.parametrize("monitor", ["loss", "val_loss"])
def test_early_stopping(monitor, first):
    patient = EarlyStopping(monitor, mode="max", patience=1, min_delta=100.0)
    order = {"before": [patient]} if first else {"after": [patient]}
    steps = steps_of(100, Validated(), val=loader(3), max_epochs=9, **order)
    assert patient.stopped_epoch == 1
    assert steps == [0, 8]


def test_early_stopping_in_the_middle_of_an_epoch():
    patient = EarlyStopping("val_loss", mode="max", patience=1, min_delta=100.0)
    settings = {"val": loader(3), "val_check_interval": 3, "max_epochs": 9}
    steps = steps_of(100, Validated(), after=[patient], **settings)
    assert steps == [0, 7]  # validated after 3 and 7 updates


def test_time_limit():
    class Slow(Plain):
        def on_train_batch_start(self, batch, batch_idx):
            time.sleep(0.3 * (self.global_step == 2))

    timer = Timer(duration=timedelta(seconds=0.3))
    model = Slow()
    steps = steps_of(100, model, after=[timer], max_epochs=9)
    assert steps == [0, model.trainer.global_step]
    assert steps[1] <= 3


def test_run_that_was_to_stop_and_goes_on_keeps_its_state():
    """A final measurement that was not final must not freeze what checkpoints keep."""

    class Undecided(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 4

        def on_train_epoch_end(self, trainer, *_):
            trainer.should_stop = False

    class Tail(Callback):
        def on_validation_end(self, trainer, *_):
            trainer.should_stop = False

    monitor = drift(3)
    settings = {"val": loader(3), "max_epochs": 3}
    seeded()
    run = fit(Validated(), [Undecided(), monitor, Tail()], **settings)
    assert run.recorder.steps("params/displacement") == [0, 3, 4, 6, 9, 12]
    state = monitor.state_dict()
    assert state["step"] == state["measured"] == 12
    seeded()
    decided = fit(Validated(), [drift(3)], **settings).recorder.measured()
    for step in (6, 9, 12):  # the length of the path has no corner at step 4
        same(run.recorder.measured()[step], decided[step])


class Stream(IterableDataset):
    """Batches of unknown number."""

    def __init__(self, length=10):
        self.length = length

    def __iter__(self):
        for index in range(self.length):
            yield torch.full((3,), float(index)), index % 2


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("epoch", [0, 4, 8]), (3, [0, 3, 6, 8]), (100, [0, 8])],
)
def test_loader_of_unknown_length(schedule, expected):
    data = DataLoader(Stream(), batch_size=3)
    assert steps_of(schedule, train=data) == expected


@pytest.mark.parametrize("schedule", ["epoch", 1, 100])
def test_fast_dev_run(schedule):
    """Lightning replaces the loggers; there is still one update."""
    monitor = drift(schedule)
    fit(Validated(), [monitor], fast_dev_run=True, val=loader(3))
    assert [step for step, _ in monitor.history] == [0, 1]


@pytest.mark.parametrize("settings", [{"max_epochs": 0}, {"limit_train_batches": 0}])
def test_no_training_is_no_measurement(settings):
    assert steps_of("epoch", **settings) == []


def test_sanity_check_and_validation_do_not_measure():
    run_steps = steps_of(
        3, Validated(), val=loader(6), num_sanity_val_steps=2, val_check_interval=1
    )
    assert run_steps == [0, 3, 6, 8]


def test_learning_rate_finder_is_not_measured():
    """Trial updates that are undone afterwards belong to no curve."""
    from lightning.pytorch.callbacks import LearningRateFinder

    class Rated(Plain):
        lr = 0.01

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    finder = LearningRateFinder(num_training_steps=3, update_attr=True)
    assert steps_of(3, Rated(), before=[finder]) == [0, 3, 6, 8]


def test_measurement_at_step_zero_sees_untrained_weights():
    torch.manual_seed(0)
    model = Plain()
    start = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    monitor = drift("epoch")
    fit(model, [monitor])
    end = torch.cat([p.detach().flatten() for p in model.parameters()])
    _, first = monitor.history[0]
    _, last = monitor.history[-1]
    assert first["params/displacement"] == 0.0
    expected = ((end - start).double().norm() / start.double().norm()).item()
    assert last["params/displacement"] == pytest.approx(expected, rel=1e-6)


def test_validate_test_and_predict_do_not_measure():
    """Mode 38."""
    from lightning.pytorch import Trainer
    from monitored import QUIET

    class Everything(Validated):
        test_step = Validated.validation_step

    monitor = drift(3)
    run = fit(Everything(), [monitor], val=loader(3))
    before = run.recorder.measured()
    state = monitor.state_dict()
    run.trainer.validate(run.model, loader(3), verbose=False)
    run.trainer.test(run.model, loader(3), verbose=False)
    run.trainer.predict(run.model, DataLoader(torch.zeros(3, 3)))
    same(run.recorder.measured(), before)
    same(monitor.state_dict(), state)

    recorder = Recorder()
    fresh = Trainer(callbacks=drift(3), logger=recorder, **QUIET)
    fresh.validate(Everything(), loader(3), verbose=False)
    assert recorder.rows
    assert not recorder.measured()

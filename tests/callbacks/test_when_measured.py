"""Exactly which steps are measured, whatever Lightning counts as a step."""

import time
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, Timer
from monitored import Plain, Recorder, Validated, fit, loader, same, seeded
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset

from ntk_callbacks import (
    JacobianMonitor,
    NTKMonitor,
    ParameterDriftMonitor,
    at,
    every,
    log_spaced,
)

# The default data make 4 batches an epoch, and 2 epochs are trained: 8 updates.


def drift(schedule):
    """The cheapest monitor; all share the shell that decides when to measure."""
    return ParameterDriftMonitor(schedule, on_error="raise")


def steps_of(schedule, model=None, before=(), after=(), **settings):
    """The steps that were logged; each must be logged once."""
    monitor = drift(schedule)
    run = fit(model or Plain(), [*before, monitor, *after], **settings)
    logged = run.recorder.steps("params/displacement")
    assert [step for step, _ in monitor.history] == logged
    return logged


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (1, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (3, [0, 3, 6, 8]),
        ("3", [0, 3, 6, 8]),
        ("3 steps", [0, 3, 6, 8]),
        (every(4), [0, 4, 8]),
        (100, [0, 8]),
        ("epoch", [0, 4, 8]),
        ("2 epochs", [0, 8]),
        ("3 epochs", [0, 8]),
        (every(1, "epochs"), [0, 4, 8]),
        ("5 per decade", [0, 1, 2, 3, 4, 6, 8]),
        (log_spaced(1), [0, 1, 8]),
        ("at 1 6", [0, 1, 6, 8]),
        (at(0, 8, 50), [0, 8]),
        (lambda step: step in (2, 5), [0, 2, 5, 8]),
    ],
    ids=lambda value: str(getattr(value, "text", value)).partition(" at 0x")[0],
)
def test_every_kind_of_schedule(schedule, expected):
    assert steps_of(schedule) == expected


@pytest.mark.parametrize(
    ("settings", "schedule", "expected"),
    [
        ({"max_steps": 6}, "epoch", [0, 4, 6]),
        ({"max_steps": 6}, 4, [0, 4, 6]),
        ({"max_steps": 8}, "epoch", [0, 4, 8]),
        ({"max_steps": 1}, "epoch", [0, 1]),
        ({"max_epochs": 1}, 3, [0, 3, 4]),
        ({"limit_train_batches": 3}, "epoch", [0, 3, 6]),
        ({"limit_train_batches": 0.5}, "epoch", [0, 2, 4]),
        ({"accumulate_grad_batches": 2}, "epoch", [0, 2, 4]),
        ({"accumulate_grad_batches": 2}, 1, [0, 1, 2, 3, 4]),
        # 4 batches in threes: the last update of an epoch has one batch.
        ({"accumulate_grad_batches": 3}, 3, [0, 3, 4]),
        ({"accumulate_grad_batches": 100}, "epoch", [0, 1, 2]),
        ({"min_epochs": 2, "max_epochs": 3}, "epoch", [0, 4, 8, 12]),
        ({"reload_dataloaders_every_n_epochs": 1}, "epoch", [0, 4, 8]),
    ],
    ids=str,
)
def test_trainer_settings(settings, schedule, expected):
    assert steps_of(schedule, **settings) == expected


def test_keys_and_steps_of_all_three():
    monitors = [
        NTKMonitor(4, 3, metrics=["trace", "kernel_velocity"], on_error="raise"),
        ParameterDriftMonitor(4, per_tensor=False, on_error="raise"),
        JacobianMonitor(4, "epoch", on_error="raise"),
    ]
    measured = fit(Plain(), monitors).recorder.measured()
    ntk = {"ntk/trace", "ntk/kernel_velocity"}
    params = {f"params/{k}" for k in ("displacement", "path_length", "cosine_to_init")}
    kinds = ("singular_value_max", "singular_value_min", "mean_square")
    rest = ("condition_number", "log_std", "isometry_gap")
    jacobian = {f"jacobian/{k}" for k in (*kinds, *rest)}
    assert {step: {*row} for step, row in measured.items()} == {
        0: ntk | params | jacobian,
        3: ntk,
        4: params | jacobian,
        6: ntk,
        8: ntk | params | jacobian,
    }
    values = [v for row in measured.values() for v in row.values()]
    assert {type(value) for value in values} == {float}


def test_logged_step_lines_up_with_the_loss_at_the_same_weights():
    """Mode 9: neither shifted by one nor carried forward to later rows."""
    losses = {}

    class Losses(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            with torch.no_grad():
                loss = cross_entropy(pl_module(batch[0]), batch[1])
            losses[trainer.global_step] = loss.item()

    def loss_of(view):
        return 1.0

    monitor = NTKMonitor(4, 2, metrics={"one": loss_of}, on_error="raise")
    run = fit(Plain(), [monitor, Losses()])
    logged = {step: row["loss"] for step, row in run.recorder.rows if "loss" in row}
    assert logged == losses  # Lightning's x of a loss is the updates made before it
    assert run.recorder.steps("ntk/one") == [0, 2, 4, 6, 8]
    assert not any("loss" in row and "ntk/one" in row for _, row in run.recorder.rows)


def test_nothing_is_logged_through_lightning():
    """Modes 9 and 11: `self.log` repeats values and is forbidden in some hooks."""
    run = fit(Plain(), [drift(3)], log_every_n_steps=2)
    tags = {*run.trainer.logged_metrics}
    assert tags
    assert not any(tag.startswith("params/") for tag in tags)
    assert run.recorder.steps("params/displacement") == [0, 3, 6, 8]


# Several optimizers, skipped updates ------------------------------------------------


class TwoOptimizers(Plain):
    """Manual optimization: `global_step` grows by two with each batch."""

    skip = ()

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        first, last = self.net[0].parameters(), self.net[2].parameters()
        return [torch.optim.SGD(first, lr=0.1), torch.optim.SGD(last, lr=0.1)]

    def training_step(self, batch, batch_idx):
        if batch_idx in self.skip:
            return
        x, y = batch
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(cross_entropy(self(x), y))
            optimizer.step()


@pytest.mark.parametrize(
    ("schedule", "settings", "expected"),
    [
        (3, {}, [0, 3, 6, 8]),
        (1, {"max_epochs": 1}, [0, 1, 2, 3, 4]),
        ("epoch", {}, [0, 4, 8]),
        # Lightning's max_steps counts the calls of both optimizers.
        (2, {"max_steps": 6}, [0, 2, 3]),
    ],
    ids=str,
)
def test_two_optimizers_count_as_one_update(schedule, settings, expected):
    """Mode 10: modulo on `global_step` would miss every other step."""
    assert steps_of(schedule, TwoOptimizers(), **settings) == expected


@pytest.mark.parametrize(
    ("skip", "schedule", "expected"),
    [
        ([3], "epoch", [0, 3, 6]),
        ([3], 2, [0, 2, 4, 6]),
        ([3], 4, [0, 4, 6]),
        ([0], "epoch", [0, 3, 6]),
        ([0, 1, 2, 3], "epoch", [0]),
    ],
)
def test_batches_without_an_update(skip, schedule, expected):
    model = TwoOptimizers()
    model.skip = skip
    assert steps_of(schedule, model) == expected


class Bypassing(Plain):
    """Steps the optimizer inside that of Lightning, which does not count this."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        x, y = batch
        optimizer = self.optimizers().optimizer
        optimizer.zero_grad()
        self.manual_backward(cross_entropy(self(x), y))
        optimizer.step()


def test_updates_that_are_not_counted_are_told_of_once():
    monitors = [drift("epoch"), NTKMonitor(4, 2, history=False)]
    with pytest.warns(UserWarning, match="stands still at 0, so that") as caught:
        run = fit(Bypassing(), monitors, max_epochs=3)
    (text,) = {str(w.message) for w in caught if "global_step" in str(w.message)}
    assert text.startswith("ParameterDriftMonitor: the weights change, but")
    assert "Bypassing optimizes manually" in text
    assert [*run.recorder.measured()] == [0]


class Skipping(Plain):
    """Returns None where there is nothing to learn from."""

    def __init__(self, *batches):
        super().__init__()
        self.batches = batches

    def training_step(self, batch, batch_idx):
        if batch_idx in self.batches:
            return None
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
@pytest.mark.parametrize("batches", [(3,), (0,), (1, 2)])
def test_training_step_that_returns_none(batches):
    """The last step is measured once, on whatever Lightning made of the None."""
    model = Skipping(*batches)
    monitor = drift("epoch")
    run = fit(model, [monitor])
    steps = run.recorder.steps("params/displacement")
    assert steps[0] == 0
    assert steps[-1] == run.trainer.global_step
    assert len(steps) == 3
    assert len({*steps}) == 3


def test_epoch_cut_short_by_on_train_batch_start():
    class Cut(Plain):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None

    assert steps_of("epoch", Cut()) == [0, 2, 4]
    assert steps_of(3, Cut()) == [0, 3, 4]


# The end ----------------------------------------------------------------------------


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


# Again with the same objects ------------------------------------------------------


def test_fit_twice_goes_on_where_it_stopped():
    """Modes 38 and 13: one trainer, two fits, one reference."""

    class Memoryless(Plain):  # because the second fit makes a new optimizer
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    seeded()
    monitor = drift(3)
    run = fit(Memoryless(), [monitor])
    first = run.recorder.steps("params/displacement")
    run.trainer.fit_loop.max_epochs = 4
    run.trainer.fit(run.model, loader())
    both = run.recorder.steps("params/displacement")
    assert first == [0, 3, 6, 8]
    assert both == [0, 3, 6, 8, 9, 12, 15, 16]
    seeded()
    unbroken = fit(Memoryless(), [drift(3)], max_epochs=4).recorder.measured()
    for step in (9, 12, 15, 16):
        same(run.recorder.measured()[step], unbroken[step])


def test_same_monitor_in_a_second_trainer_starts_afresh():
    seeded()
    expected = fit(Plain(), [NTKMonitor(4, 3, on_error="raise")]).recorder.measured()
    monitor = NTKMonitor(4, 3, on_error="raise")
    fit(Plain(), [monitor], train=loader(6), max_epochs=3)
    seeded()
    second = fit(Plain(), [monitor])
    assert [*second.recorder.measured()] == [0, 3, 6, 8]
    same(second.recorder.measured(), expected)


def test_same_monitor_after_a_run_that_died_at_once():
    """A notebook: the first training step raises, the cell is corrected and run."""

    class Broken(Plain):
        def training_step(self, batch, batch_idx):
            raise ValueError("a mistake")

    monitor = drift(3)
    with pytest.raises(ValueError, match="a mistake"):
        fit(Broken(), [monitor])
    seeded(5)
    second = fit(Plain(), [monitor])
    assert [*second.recorder.measured()] == [0, 3, 6, 8]
    assert second.recorder.measured()[0]["params/displacement"] == 0.0


def test_monitor_that_stepped_aside_tries_again_in_a_new_run():
    monitor = NTKMonitor(20, 3)
    with pytest.warns(UserWarning, match="off for the rest of this run"):
        assert not fit(Plain(), [monitor]).recorder.measured()
    second = fit(Plain(), [monitor], train=loader(20, 5))
    assert [*second.recorder.measured()] == [0, 3, 6, 8]


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

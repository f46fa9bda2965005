"""Exactly which steps are measured, whatever Lightning counts as a step."""

import pytest
import torch
from lightning.pytorch import Callback
from measured_steps import drift, steps_of
from monitored import Plain, fit
from torch.nn.functional import cross_entropy

from ntk_callbacks import (
    JacobianMonitor,
    NTKMonitor,
    ParameterDriftMonitor,
    at,
    every,
    log_spaced,
)

# The default data make 4 batches an epoch, and 2 epochs are trained: 8 updates.


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

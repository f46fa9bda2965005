"""EarlyStopping, ModelCheckpoint and schedulers act on measured values."""

import math

import lightning.pytorch.callbacks as lightning_callbacks
import pytest
import pytorch_lightning
import pytorch_lightning.callbacks as other_callbacks
import torch
from lightning.pytorch import Callback, Trainer
from monitored import OtherPlain, Plain, Validated, fit, loader, seeded

from ntk_callbacks import JacobianMonitor, NTKMonitor, ParameterDriftMonitor

NAMESPACES = {
    "lightning": (Trainer, Plain, lightning_callbacks),
    "pytorch_lightning": (pytorch_lightning.Trainer, OtherPlain, other_callbacks),
}


class Looks(Callback):
    """What a callback finds at each of the moments when one may look."""

    def __init__(self, tag):
        self.tag = tag
        self.found = {}

    def look(self, trainer, moment):
        value = trainer.callback_metrics.get(self.tag)
        seen = self.found.setdefault(moment, [])
        seen.append((trainer.global_step, None if value is None else float(value)))

    def on_train_batch_end(self, trainer, *_):
        self.look(trainer, "batch")

    def on_validation_end(self, trainer, _):
        self.look(trainer, "validation")

    def on_train_epoch_end(self, trainer, _):
        self.look(trainer, "epoch")


def latest(history, tag, step):
    return [row[tag] for at, row in history if at <= step][-1]


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_early_stopping_stops_where_the_measured_value_says(namespace):
    kind, model, callbacks = NAMESPACES[namespace]
    tag = "params/displacement"
    free = ParameterDriftMonitor(every="epoch", on_error="raise")
    seeded()
    fit(model(), [free], kind=kind, train=loader(shuffle=True), max_epochs=6)
    by_epoch = [row[tag] for step, row in free.history if step]
    assert by_epoch == sorted(by_epoch)  # so the third epoch's value divides them
    bound = (by_epoch[2] + by_epoch[1]) / 2
    for first in (True, False):
        monitor = ParameterDriftMonitor(every="epoch", on_error="raise")
        stop = callbacks.EarlyStopping(
            tag, mode="min", patience=100, divergence_threshold=bound
        )
        seeded()
        ordered = [stop, monitor] if first else [monitor, stop]
        run = fit(model(), ordered, kind=kind, train=loader(shuffle=True), max_epochs=6)
        assert run.trainer.current_epoch == 3
        assert [step for step, _ in monitor.history] == [0, 4, 8, 12]


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_the_best_checkpoints_are_those_of_the_best_measurements(namespace, tmp_path):
    kind, model, callbacks = NAMESPACES[namespace]
    monitor = NTKMonitor(4, every="epoch", on_error="raise")
    best = callbacks.ModelCheckpoint(
        tmp_path, "{step}-{ntk/relative_change:.4f}", "ntk/relative_change", mode="max"
    )
    seeded()
    fit(model(), [best, monitor], kind=kind, enable_checkpointing=True, max_epochs=5)
    step, value = max(
        ((step, row["ntk/relative_change"]) for step, row in monitor.history),
        key=lambda pair: pair[1],
    )
    assert float(best.best_model_score) == pytest.approx(value, rel=1e-6)
    assert best.best_model_path.endswith(f"relative_change={value:.4f}.ckpt")
    saved = torch.load(best.best_model_path, weights_only=True)
    assert saved["global_step"] == step > 0


@pytest.mark.parametrize("every", [1, 3, "epoch", "2 epochs", "5 per decade", "at 5"])
def test_the_latest_value_is_there_whenever_a_callback_looks(every):
    monitor = JacobianMonitor(4, every, on_error="raise")
    looks = Looks(tag := "jacobian/mean_square")
    fit(
        Validated(),
        [looks, monitor],
        val=loader(6),
        max_epochs=3,
        val_check_interval=0.5,
    )
    assert {moment: len(seen) for moment, seen in looks.found.items()} == {
        "batch": 12,
        "validation": 6,
        "epoch": 3,
    }
    for moment in ("validation", "epoch"):
        for step, value in looks.found[moment]:
            expected = latest(monitor.history, tag, step)
            assert value == pytest.approx(expected, rel=1e-6), (moment, step)


def test_a_callback_behind_the_monitor_sees_the_value_of_this_update():
    monitor = JacobianMonitor(4, 1, on_error="raise")
    looks = Looks(tag := "jacobian/mean_square")
    fit(Plain(), [monitor, looks])
    assert [value for _, value in looks.found["batch"]] == pytest.approx(
        [row[tag] for step, row in monitor.history if step], rel=1e-6
    )


def test_a_resumed_run_stops_where_an_unbroken_one_does(tmp_path):
    """The value of a measurement before the interruption counts until the next."""

    def callbacks():
        return [
            lightning_callbacks.EarlyStopping(
                "params/path_length", mode="max", patience=2, check_finite=False
            ),
            ParameterDriftMonitor(every="3 epochs", on_error="raise"),
        ]

    seeded()
    unbroken = fit(Plain(), callbacks(), max_epochs=20)
    # Measured after epochs 3, 6, …: from the first value on, two repeats are too many.
    assert unbroken.trainer.current_epoch < 20
    for interrupted in (1, 2):
        seeded()
        path = tmp_path / f"{interrupted}.ckpt"
        first = fit(Plain(), callbacks(), max_epochs=interrupted)
        first.trainer.save_checkpoint(path)
        resumed = fit(Plain(), callbacks(), max_epochs=20, ckpt_path=path)
        assert resumed.trainer.current_epoch == unbroken.trainer.current_epoch


def test_a_scheduler_follows_a_measured_value():
    class Scheduled(Plain):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimizer, mode="min", factor=0.5, patience=0
            )
            config = {"scheduler": scheduler, "monitor": "params/path_length"}
            return {"optimizer": optimizer, "lr_scheduler": config}

    model = Scheduled()
    monitor = ParameterDriftMonitor(every="epoch", on_error="raise")
    run = fit(model, [monitor], max_epochs=3)
    # A path only grows: no improvement after the first epoch.
    assert run.trainer.optimizers[0].param_groups[0]["lr"] == 0.25


def test_numbers_that_are_not_finite_stay_as_they_are():
    monitor = NTKMonitor(4, every="at 100", on_error="raise")
    looks = Looks("ntk/kernel_velocity")
    fit(Plain(), [looks, monitor], max_epochs=1, limit_train_batches=2)
    assert math.isnan(looks.found["batch"][0][1])


def test_nothing_is_left_of_an_earlier_fit():
    monitor = NTKMonitor(4, every="epoch", on_error="raise")
    run = fit(Plain(), [monitor], max_epochs=1)
    assert "ntk/trace" in run.trainer.callback_metrics
    run.trainer.callbacks.remove(monitor)
    run.trainer.fit_loop.max_epochs = 2
    run.trainer.fit(Plain(), loader())
    assert "ntk/trace" not in run.trainer.callback_metrics

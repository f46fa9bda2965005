"""The step a monitor predicts is the step that is made; nothing else notices it."""

import copy
import pickle

import pytest
import torch
from interrupted import Repeatable, Save
from lightning.pytorch import Callback
from monitored import Delicate, Plain, Recorder, fit, loader, same, seeded, smooth_net
from predicted import (
    GROUP,
    OPTIMIZERS,
    SCORES,
    monitor,
    rows,
    run,
    shortened,
    trained_with,
)
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW

from ntk_callbacks import Probe
from ntk_callbacks.callbacks.prediction import PredictionMonitor

SETTINGS = {
    "plain": {},
    "clipped by norm": {"gradient_clip_val": 0.05},
    "clipped by value": {
        "gradient_clip_val": 0.01,
        "gradient_clip_algorithm": "value",
    },
    "accumulated": {"accumulate_grad_batches": 2, "max_steps": 4},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_small_steps_are_foretold_within_five_percent(optimizer, setting):
    used = monitor()
    model = trained_with(OPTIMIZERS[optimizer])
    run(model, used, **SETTINGS[setting])
    found = rows(used)
    steps = 4 if setting == "accumulated" else 8
    assert [*found] == [*range(1, steps + 1)]
    for row in found.values():
        assert row.keys() == SCORES
        assert row["step_error"] == 0.0  # to the last bit
        assert row["output_cosine"] > 0.9999
        assert row["output_error"] < 0.01
        assert row["explained"] > 0.95
        assert row["loss_change_linearized"] == pytest.approx(
            row["loss_change_actual"], rel=0.05
        )


def wide_net():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 2))


def test_plain_kernel_is_off_by_more_than_ten_under_adam():
    """Adam's steps do not shrink with the gradient, those of plain descent do."""

    class Easy(Plain):
        """Gradients a hundred times smaller: Adam does not notice."""

        def __init__(self):
            super().__init__(wide_net())

        def training_step(self, batch, batch_idx):
            return 0.01 * super().training_step(batch, batch_idx)

    used = PredictionMonitor(12, 1, on_error="raise")
    run(trained_with(OPTIMIZERS["adam"], Easy), used, train=loader(12, 12))
    for row in rows(used).values():
        actual = row["loss_change_actual"]
        assert row["loss_change_optimizer"] == pytest.approx(actual, rel=0.05)
        assert actual / row["loss_change_gradient_flow"] > 10
    plain = PredictionMonitor(12, 1, on_error="raise")
    run(trained_with(OPTIMIZERS["sgd"], Easy), plain, train=loader(12, 12))
    for row in rows(plain).values():
        flow = row["loss_change_gradient_flow"]
        assert flow == pytest.approx(row["loss_change_optimizer"], rel=1e-3)


def test_loss_is_that_of_the_probe_before_and_after():
    """By a callback that looks itself."""

    class Look(Callback):
        def __init__(self, inputs, labels):
            self.x, self.y, self.losses = inputs, labels, {}

        def look(self, trainer, pl_module):
            with torch.no_grad():
                logits = pl_module.net(self.x)
            loss = cross_entropy(logits.double(), self.y)
            self.losses[trainer.global_step] = loss.item()

        def on_train_start(self, trainer, pl_module):
            self.look(trainer, pl_module)

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.look(trainer, pl_module)

    probe = Probe(torch.eye(3), torch.tensor([1, 0, 1]))
    used, look = (
        PredictionMonitor(probe, 3, on_error="raise"),
        Look(torch.eye(3), probe.targets),
    )
    seeded()
    fit(Plain(), [used, look], max_steps=8)
    assert [step for step, _ in used.history] == [0, 3, 6, 8]
    assert shortened(used.history[0][1]) == {"loss": pytest.approx(look.losses[0])}
    for step, row in rows(used).items():
        before, after = look.losses[step - 1], look.losses[step]
        assert row["loss"] == pytest.approx(after, rel=1e-6)
        assert row["loss_change_actual"] == pytest.approx(after - before, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "every", "steps"),
    [
        ({"max_steps": 7}, 3, [0, 3, 6, 7]),
        ({"max_epochs": 2}, "epoch", [0, 4, 8]),
        ({"max_epochs": 2}, 3, [0, 3, 6, 8]),
        ({"max_epochs": 2, "accumulate_grad_batches": 3}, 100, [0, 4]),
        ({"max_epochs": 3, "limit_train_batches": 3}, "2 epochs", [0, 6, 9]),
    ],
)
def test_every_measured_step_was_predicted(settings, every, steps):
    used = monitor(every)
    seeded()
    fit(Plain(), [used], **settings)
    assert [step for step, _ in used.history] == steps
    assert [*rows(used)] == steps[1:]


def test_last_step_that_another_callback_decides_has_only_a_loss():
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 6

    used = monitor(5)
    seeded()
    fit(Plain(), [used, Stop()], max_epochs=5)
    assert [step for step, _ in used.history] == [0, 5, 6]
    assert shortened(used.history[-1][1]).keys() == {"loss"}


@pytest.mark.parametrize("every", [1, "epoch"])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_training_is_the_same_to_the_last_bit(every, clip):
    def delicate(callbacks):
        seeded()
        return fit(
            Delicate(),
            callbacks,
            train=loader(15, shuffle=True),
            val=loader(6),
            accumulate_grad_batches=2,
            gradient_clip_val=clip,
            max_epochs=3,
        )

    used = monitor(every, per_class=True)
    monitored = delicate([used])
    expected = [*range(1, 10)] if every == 1 else [3, 6, 9]
    assert [*rows(used)] == expected
    assert all(row["step_error"] == 0.0 for row in rows(used).values())
    same(monitored.trace(), delicate([]).trace())


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended")
@pytest.mark.parametrize("every", [1, 3, "epoch"])
@pytest.mark.parametrize("cut", [5, 6, 8])
def test_resumed_run_draws_the_same_curves(every, cut):
    model = trained_with(lambda m: AdamW(m.parameters(), 0.01), Repeatable)
    whole, again, recorder = monitor(every), monitor(every), Recorder()
    seeded()
    fit(model(), [whole, Save(cut)], max_steps=12)
    run(model, again, max_steps=12, ckpt_path="cut.ckpt", logger=recorder)
    expected = dict(whole.history)
    assert [*expected] == {1: [*range(13)], 3: [0, 3, 6, 9, 12]}.get(
        every, [0, 4, 8, 12]
    )
    logged = {
        step: {tag: value for tag, value in row.items() if tag.startswith(GROUP)}
        for step, row in recorder.rows
        if f"{GROUP}loss" in row
    }
    same(logged, {step: row for step, row in expected.items() if step > cut})
    same(dict(again.history), expected)


@pytest.mark.parametrize(
    "copy_of",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "pickle"],
)
def test_copies_before_and_after_use(copy_of):
    used = copy_of(monitor(2))
    run(Plain, used)
    again = copy_of(used)
    assert again.history == used.history
    assert again.state_key == used.state_key
    run(Plain, again)
    same(again.history, used.history)


def test_nothing_is_held_after_a_measurement():
    used = monitor(2)
    run(Plain, used)
    assert used.instrument._pending is None
    assert used.state_dict()["instrument"] == {}


def test_frozen_and_unused_parameters():
    class Spare(Plain):
        def __init__(self):
            super().__init__(smooth_net())
            self.spare = nn.Linear(2, 2)
            self.net[0].bias.requires_grad_(False)

    used = monitor()
    run(trained_with(OPTIMIZERS["adamw"], Spare), used, max_steps=3)
    for row in rows(used).values():
        assert row["step_error"] == 0.0
        assert row["explained"] > 0.95


def test_tags_by_class_and_own_names():
    used = monitor(4, per_class=True, name="held_out")
    run(Plain, used)
    tags = {tag for _, row in used.history for tag in row}
    classes = {
        f"held_out_classes/loss_change_{part}/{label}"
        for part in ("actual", "optimizer", "gradient_flow")
        for label in (0, 1)
    }
    assert tags == {f"held_out/{score}" for score in SCORES} | classes
    for score in SCORES:
        assert f"`prediction/{score}`" in PredictionMonitor.__doc__

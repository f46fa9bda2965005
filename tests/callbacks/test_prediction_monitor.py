"""The step a monitor predicts is the step that is made, however a run is trained."""

import copy
import math
import pickle

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from monitored import (
    Ascending,
    Delicate,
    FloatPrecision,
    Plain,
    Recorder,
    fit,
    loader,
    same,
    seeded,
    smooth_net,
)
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from ntk_callbacks import Probe
from ntk_callbacks.callbacks.prediction import PredictionMonitor

GROUP = "prediction/"
SCORES = {
    *("loss", "loss_change_actual", "loss_change_optimizer"),
    *("loss_change_gradient_flow", "loss_change_linearized", "explained"),
    *("output_cosine", "output_error", "step_error"),
}


def trained_with(make, base=Plain):
    """A module with an optimizer made from its parameters."""

    class Module(base):
        def configure_optimizers(self):
            return make(self)

    Module.__name__ = base.__name__
    return Module


def monitor(every=1, **settings):
    return PredictionMonitor(4, every, on_error="raise", **settings)


def rows(used):
    """Step -> scores without their group, of the steps that were predicted."""
    found = {step: shortened(row) for step, row in used.history}
    return {step: row for step, row in found.items() if "step_error" in row}


def shortened(row):
    return {tag.removeprefix(GROUP): value for tag, value in row.items()}


def run(model, used, **settings):
    seeded()
    return fit(model(), [used], **({"max_steps": 8} | settings))


def groups(module):
    first, last = module.net[0].parameters(), module.net[2].parameters()
    return [{"params": [*first], "lr": 3e-4}, {"params": [*last], "lr": 3e-5}]


OPTIMIZERS = {
    "sgd": lambda m: SGD(m.parameters(), 1e-3),
    "momentum": lambda m: SGD(m.parameters(), 1e-3, momentum=0.9),
    "nesterov": lambda m: SGD(m.parameters(), 1e-3, momentum=0.9, nesterov=True),
    "decay": lambda m: SGD(m.parameters(), 1e-3, weight_decay=0.5),
    "adam": lambda m: Adam(m.parameters(), 1e-4),
    "adamw": lambda m: AdamW(m.parameters(), 1e-4, weight_decay=0.5),
    "amsgrad, looped": lambda m: Adam(
        m.parameters(), 1e-4, amsgrad=True, foreach=False
    ),
    "fused": lambda m: AdamW(m.parameters(), 1e-4, fused=True),
    "rates by group": lambda m: AdamW(groups(m)),
    "rmsprop": lambda m: RMSprop(m.parameters(), 1e-5),
}

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


# Steps that are not plain -----------------------------------------------------------


class Manual(Plain):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        x, y = batch
        optimizer = self.optimizers()
        for _ in range(2):  # two steps that count as one update
            optimizer.zero_grad()
            self.manual_backward(cross_entropy(self(x), y))
            self.clip_gradients(optimizer, 0.05, "norm")
            optimizer.step()
        optimizer.zero_grad()


def test_manual_optimization_that_steps_twice():
    used = monitor()
    run(trained_with(OPTIMIZERS["adamw"], Manual), used, max_epochs=2)
    assert len(rows(used)) > 3
    for row in rows(used).values():
        assert row["step_error"] < 1e-6
        assert row["explained"] > 0.95


class TwoOptimizers(Plain):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return SGD(self.net[0].parameters(), 1e-3), Adam(self.net[2].parameters(), 1e-4)

    def training_step(self, batch, batch_idx):
        x, y = batch
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(cross_entropy(self(x), y))
            optimizer.step()
            self.untoggle_optimizer(optimizer)


@pytest.mark.parametrize("settings", [{"max_epochs": 2}, {"max_steps": 8}])
def test_two_optimizers_make_one_update(settings):
    used = monitor(3)
    seeded()
    fit(TwoOptimizers(), [used], **settings)
    last = 8 if "max_epochs" in settings else 4  # Lightning counts optimizer steps
    assert [*rows(used)] == [step for step in (3, 6, last) if step <= last]
    for row in rows(used).values():
        assert row["step_error"] < 1e-6
        assert row["explained"] > 0.95


class OwnClipping(Plain):
    """Clips layer by layer, logs and counts."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def configure_gradient_clipping(self, optimizer, **_):
        self.calls += 1
        for layer in (self.net[0], self.net[2]):
            norm = nn.utils.clip_grad_norm_(layer.parameters(), 0.02)
            self.log("norm", norm, on_step=True, on_epoch=True, reduce_fx="sum")


def test_clipping_of_the_module_itself_is_foreseen_without_a_trace():
    model, used = trained_with(OPTIMIZERS["sgd"], OwnClipping), monitor()
    monitored = run(model, used)
    assert [*rows(used)] == [*range(1, 9)]
    for row in rows(used).values():
        assert row["step_error"] == 0.0
        change, flow = row["loss_change_optimizer"], row["loss_change_gradient_flow"]
        assert abs(change) < 0.5 * abs(flow)
    seeded()
    bare = fit(model(), max_steps=8)
    same(monitored.trace(), bare.trace())
    assert monitored.model.calls == bare.model.calls == 8


class Holder:
    """Keeps a parameter from a module, and from the guard of one."""

    def __init__(self):
        self.scale = nn.Parameter(torch.tensor([3.0, -2.0]))


class Hidden(Plain):
    """Trains a scale that is not registered, with a gradient larger than all others."""

    def __init__(self):
        super().__init__()
        self.hidden = Holder()

    def forward(self, x):
        return self.hidden.scale * self.net(x)

    def configure_optimizers(self):
        return SGD([*self.parameters(), self.hidden.scale], 0.1)


class HiddenClipped(Hidden):
    def configure_gradient_clipping(self, optimizer, **_):
        self.clip_gradients(optimizer, 0.02, "norm")


@pytest.mark.parametrize("kind", [Hidden, HiddenClipped])
def test_parameters_that_are_not_registered_count_for_the_norm(kind):
    settings = {"max_steps": 8}
    if kind is Hidden:
        settings |= {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "norm"}
    used = monitor()
    seeded()
    monitored = fit(kind(), [used], **settings)
    assert [*rows(used)] == [*range(1, 9)]
    seeded()
    bare = fit(kind(), **settings)
    same(monitored.trace(), bare.trace())
    assert torch.equal(monitored.model.hidden.scale, bare.model.hidden.scale)
    for row in rows(used).values():
        assert row["step_error"] < 1e-5


def test_gradients_changed_after_the_prediction_show_as_its_error():
    class Halved(Plain):
        def on_before_optimizer_step(self, optimizer):
            for parameter in self.parameters():
                parameter.grad *= 0.5

    used = monitor()
    run(trained_with(OPTIMIZERS["sgd"], Halved), used, max_steps=3)
    for row in rows(used).values():
        assert row["step_error"] == pytest.approx(1.0, rel=1e-3)


class Overflowing(Plain):
    """The third loss is not finite."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * (math.inf if self.global_step == 2 else 1.0)


@pytest.mark.parametrize("fused", [False, True])
def test_step_that_a_scaler_skips(fused):
    def run_with(callbacks):
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        plugin = FloatPrecision("16-mixed", "cpu", scaler)
        make = OPTIMIZERS["fused" if fused else "adamw"]
        seeded()
        return fit(
            trained_with(make, Overflowing)(), callbacks, plugins=plugin, max_steps=5
        )

    used = monitor()
    monitored = run_with([used])
    found = rows(used)
    assert [*found] == [1, 2, 3, 4, 5]
    for step, row in found.items():
        assert row["step_error"] == 0.0
        moved = {row[name] for name in SCORES if "change" in name}
        assert (moved == {0.0}) == (step == 3)
        assert step == 3 or row["explained"] > 0.95
    same(monitored.trace(), run_with([]).trace())


def test_learning_rate_of_the_moment_counts():
    class Scheduled(Plain):
        def configure_optimizers(self):
            optimizer = SGD(self.parameters(), 1e-3, momentum=0.5)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: k / 4)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    used = monitor()
    run(Scheduled, used, max_steps=5)
    assert [row["step_error"] for row in rows(used).values()] == [0.0] * 5
    assert rows(used)[1]["loss_change_optimizer"] == 0.0


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision(precision):
    class Cast(Plain):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return cross_entropy(self(x.to(next(self.parameters()).dtype)), y)

    used = monitor(2)
    run(
        trained_with(lambda m: SGD(m.parameters(), 0.02), Cast),
        used,
        precision=precision,
    )
    assert [*rows(used)] == [2, 4, 6, 8]
    for row in rows(used).values():
        assert row["step_error"] == 0.0
        assert row["output_cosine"] > 0.99


# What a monitor must not do --------------------------------------------------------


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


class Save(Callback):
    """A checkpoint after an update, in the middle of an epoch or at its end."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint("cut.ckpt")


class Repeatable(Plain):
    """Trains on data made from the step, so that a resumed loader does not matter."""

    def training_step(self, batch, batch_idx):
        generator = torch.Generator().manual_seed(self.global_step)
        x = torch.randn(6, 3, generator=generator)
        return cross_entropy(self(x), torch.arange(6) % 2)


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


# What cannot be ---------------------------------------------------------------------


def stepped_aside(model, what, used=None, **settings):
    """A warning that says why; training as without the monitor."""
    used = used or PredictionMonitor(4, 1)
    with pytest.warns(UserWarning, match=what) as caught:
        monitored = run(model, used, **settings)
    texts = [str(w.message) for w in caught if "PredictionMonitor" in str(w.message)]
    assert len(texts) == 1
    assert "step 1 failed" in texts[0]
    assert "off for the rest of this run; training goes on" in texts[0]
    seeded()
    same(monitored.trace(), fit(model(), **({"max_steps": 8} | settings)).trace())
    assert not rows(used)


def test_optimizers_with_a_closure_are_refused():
    model = trained_with(lambda m: torch.optim.LBFGS(m.parameters(), 0.1))
    stepped_aside(model, r"LBFGS.*steps without a closure", max_steps=3)
    with pytest.raises(RuntimeError, match="LBFGS"):
        run(model, monitor(), max_steps=3)


class Locked(SGD):
    """Holds what cannot be copied."""

    def __init__(self, parameters):
        super().__init__(parameters, 0.1)
        self.generator = (number for number in range(3))


def test_optimizers_that_cannot_be_copied_are_refused():
    stepped_aside(trained_with(lambda m: Locked(m.parameters())), "cannot be copied")


def test_random_outputs_are_refused():
    class Noisy(Plain):
        def forward(self, x):
            return self.net(x + torch.randn_like(x))

    stepped_aside(Noisy, "draws random numbers")


@pytest.mark.parametrize("manual", [False, True])
def test_optimizers_that_evaluate_the_loss_again_are_refused(manual):
    class Closed(Plain):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = not manual

        def training_step(self, batch, batch_idx):
            def closure():
                optimizer.zero_grad()
                loss = cross_entropy(self(batch[0]), batch[1])
                self.manual_backward(loss)
                return loss

            if not manual:
                return super().training_step(batch, batch_idx)
            optimizer = self.optimizers()
            optimizer.step(closure=closure)
            return None

    stepped_aside(
        trained_with(lambda m: Ascending(m.parameters(), 0.1), Closed),
        "Ascending evaluates the loss more than once",
    )


def test_failing_prediction_is_tried_again_then_given_up():
    class Failing(Optimizer):
        """Has a rule of its own that fails on the side."""

        def __init__(self, parameters):
            super().__init__(parameters, {"lr": 0.1})

        def step(self, closure=None):
            return closure()

        def __deepcopy__(self, memo):
            raise ArithmeticError("no copies")

    stepped_aside(trained_with(lambda m: Failing(m.parameters())), "no copies")


def test_failing_loss_is_tried_three_times():
    def failing(outputs, targets):
        raise ArithmeticError("the loss is broken")

    used = PredictionMonitor(4, 1, loss_fn=failing)
    with pytest.warns(UserWarning, match="the loss is broken") as caught:
        monitored = run(Plain, used)
    texts = [str(w.message) for w in caught if "is broken" in str(w.message)]
    assert len(texts) == 3
    seeded()
    same(monitored.trace(), fit(Plain(), max_steps=8).trace())


def test_module_that_clips_itself_on_several_processes_is_refused(monkeypatch):
    from lightning.pytorch import Trainer

    monkeypatch.setattr(Trainer, "world_size", 2)
    model = trained_with(OPTIMIZERS["sgd"], OwnClipping)
    stepped_aside(model, r"OwnClipping.configure_gradient_clipping may wait for other")


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended")
def test_sharded_weights_are_not_touched_where_a_run_goes_on():
    """There the step comes before any measurement that could refuse them."""

    class FSDPStrategy(SingleDeviceStrategy):
        """Only the name is that of the sharding one."""

    run(Plain, monitor(), max_steps=3).trainer.save_checkpoint("3.ckpt")
    used = PredictionMonitor(4, 1)
    asked = []
    used.instrument.predict = lambda *_, **__: asked.append(1)
    strategy = FSDPStrategy(torch.device("cpu"))
    with pytest.warns(UserWarning, match="step 4 failed.*sharded by FSDPStrategy"):
        run(Plain, used, max_steps=6, ckpt_path="3.ckpt", strategy=strategy)
    assert not asked


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

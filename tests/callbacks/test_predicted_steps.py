"""Steps that are not plain are predicted too: by hand, clipped, skipped, in halves."""

import math

import pytest
import torch
from monitored import FloatPrecision, Plain, fit, same, seeded
from predicted import OPTIMIZERS, SCORES, OwnClipping, monitor, rows, run, trained_with
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam


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

"""A linearized twin follows the trainer step by step; nothing else notices it."""

import copy
import math
import pickle

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from monitored import (
    Ascending,
    Delicate,
    FloatPrecision,
    Plain,
    Recorder,
    examples,
    fit,
    loader,
    same,
    seeded,
)
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, AdamW

from ntk_callbacks import Probe
from ntk_callbacks.callbacks.linearization import LinearizationMonitor
from ntk_callbacks.instruments.linearization import LinearizationInstrument
from ntk_callbacks.instruments.linearization_options import LinearizationOptions

TAGS = {"output_distance", "loss", "loss_gap", "agreement", "parting_step"}
TWIN = {"twin_output_distance", "twin_loss", "twin_agreement", "twin_parting_step"}
ACCURACIES = {"network_accuracy", "after_kernel_accuracy", "initial_kernel_accuracy"}


def held_out():
    x, y = examples(20).tensors
    return Probe(x[12:], y[12:])


def monitor(every=2, *, twin=True, **settings):
    return LinearizationMonitor(6, every, twin=twin, on_error="raise", **settings)


def rows(used):
    """Step -> values without their group."""
    return {
        step: {tag.removeprefix("linear/"): value for tag, value in row.items()}
        for step, row in used.history
    }


def run(model, callbacks=(), **settings):
    seeded()
    return fit(model(), list(callbacks), **({"max_steps": 8} | settings))


def test_all_scalars_by_steps():
    used = monitor(3, held_out=held_out())
    done = run(Plain, [used])
    found = rows(used)
    assert [*found] == [0, 3, 6, 8]
    for row in found.values():
        assert row.keys() == TAGS | TWIN | ACCURACIES
    assert math.isnan(found[0]["output_distance"])
    assert 0 < found[8]["output_distance"] < 1
    logged = [row for _, row in done.recorder.rows if "linear/loss" in row]
    assert [*logged[-1]] == [*used.history[-1][1], "monitor/seconds_linear"]
    for tag in TAGS | TWIN | ACCURACIES:
        assert f"`linear/{tag}`" in LinearizationMonitor.__doc__


def test_logged_is_what_the_instrument_measures():
    probe, watched = Probe(torch.eye(3), torch.tensor([1, 0, 1])), []

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            instrument = LinearizationInstrument(held_out=held_out())
            instrument.start(probe)
            watched.append((instrument, instrument.measure(pl_module, 0)))

    used = LinearizationMonitor(probe, 4, held_out=held_out(), on_error="raise")
    done = run(Plain, [used, Look()])
    ((instrument, first),) = watched
    same(used.history[0][1], first.scalars)
    same(used.history[-1][1], instrument.measure(done.model, 8).scalars)


# The twin of a network that is linear in its weights is the network ------------------


class Linear(Plain):
    """Three features, two logits."""

    def __init__(self):
        super().__init__(nn.Linear(3, 2))

    def configure_optimizers(self):
        return AdamW(self.parameters(), 0.1, weight_decay=0.1)


def linear_with(make):
    class Module(Linear):
        def configure_optimizers(self):
            return make(self)

    Module.__name__ = "Linear"
    return Module


def scheduled(module):
    optimizer = SGD(module.parameters(), 0.3, momentum=0.9)
    decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    return [optimizer], [{"scheduler": decay, "interval": "step"}]


OPTIMIZERS = {
    "sgd": lambda m: SGD(m.parameters(), 0.3),
    "nesterov": lambda m: SGD(m.parameters(), 0.3, momentum=0.9, nesterov=True),
    "scheduled": scheduled,
    "adamw": lambda m: AdamW(m.parameters(), 0.1, weight_decay=0.1),
    "fused": lambda m: Adam(m.parameters(), 0.1, fused=True),
    "groups": lambda m: Adam(
        [{"params": [m.net.weight], "lr": 0.1}, {"params": [m.net.bias], "lr": 0.01}]
    ),
}

SETTINGS = {
    "plain": {},
    "clipped by norm": {"gradient_clip_val": 0.2},
    "clipped by value": {
        "gradient_clip_val": 0.1,
        "gradient_clip_algorithm": "value",
    },
    # Four batches an epoch, of which the last makes a step of its own.
    "accumulated": {"accumulate_grad_batches": 3, "max_steps": 6},
}


def followed(model, used=None, steps=8, **settings):
    """Runs; the twin's weights are the network's, which have moved."""
    used = used or monitor(1)
    done = run(model, [used], **settings)
    twin, point = used.instrument.twin, used.instrument.point
    for name, tensor in done.model.named_parameters():
        expected = tensor.detach()
        assert torch.allclose(twin.parameters[name], expected, rtol=0, atol=2e-6)
    moved = [
        (done.model.get_parameter(name) - start).abs().max().item()
        for name, start in point.parameters.items()
    ]
    assert max(moved) > 0.05
    assert [*rows(used)] == [*range(steps + 1)]
    for step, row in rows(used).items():
        assert step == 0 or row["twin_output_distance"] < 2e-5
        assert row["twin_loss"] == pytest.approx(row["loss"], abs=1e-6)
        assert row["twin_agreement"] == row["agreement"] == 1.0
        assert math.isnan(row["twin_parting_step"])
    return done


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_twin_follows_every_step(optimizer, setting):
    settings = SETTINGS[setting]
    steps = settings.get("max_steps", 8)
    followed(linear_with(OPTIMIZERS[optimizer]), steps=steps, **settings)


def test_twin_follows_clipping_of_the_module_itself():
    class Own(Linear):
        def configure_gradient_clipping(self, optimizer, **_):
            self.log("norm", nn.utils.clip_grad_norm_([self.net.weight], 0.1))

    done = followed(Own)
    same(done.trace()["weights"], run(Own).trace()["weights"])


@pytest.mark.parametrize("fused", [False, True])
def test_twin_skips_the_steps_that_a_scaler_skips(fused):
    class Overflowing(linear_with(lambda m: AdamW(m.parameters(), 0.1, fused=fused))):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * (math.inf if self.global_step == 2 else 1.0)

    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    followed(Overflowing, plugins=FloatPrecision("16-mixed", "cpu", scaler))


@pytest.mark.filterwarnings("ignore:.*returned `None`")  # Lightning, once a process
def test_batches_without_a_loss_are_left_out():
    class Skipping(Linear):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                return None
            return super().training_step(batch, batch_idx)

    followed(Skipping)


def test_gradients_that_make_no_step_are_forgotten():
    class Alternating(Linear):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            if batch_idx % 2 == 0:
                optimizer.step(closure=optimizer_closure)
            else:
                optimizer_closure()

    followed(Alternating)


def test_modules_that_forget_gradients_themselves():
    class Own(Linear):
        """Adds up the gradients of two batches, without Lightning's knowledge."""

        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            pass

        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            if batch_idx % 2 == 0:
                optimizer.step(closure=optimizer_closure)
                optimizer.zero_grad()
            else:
                optimizer_closure()

    followed(Own)


def test_layers_thaw_on_the_way():
    class Thawing(Linear):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
            self.net[0].requires_grad_(False)

        def configure_optimizers(self):
            return SGD([self.net[1].weight], 0.3, momentum=0.9)

        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                group = {"params": [self.net[1].bias], "lr": 0.1}
                self.optimizers().optimizer.add_param_group(group)

    followed(Thawing)


def test_layers_that_are_added_on_the_way_turn_it_off_at_once():
    class Growing(Linear):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.net = nn.Sequential(self.net, nn.Linear(2, 2))
                (optimizer,) = self.trainer.optimizers
                optimizer.add_param_group({"params": [*self.net[1].parameters()]})

    used = LinearizationMonitor(held_out(), 2, twin=True)
    with pytest.warns(UserWarning, match="not those of the first") as caught:
        run(Growing, [used])
    texts = [str(w.message) for w in caught if "those of the first" in str(w.message)]
    assert ["the rest of this run" in text for text in texts] == [True, True]
    assert ["linearized twin is off" in text for text in texts] == [True, False]
    assert all("net.1.weight" in text for text in texts)
    assert [*rows(used)] == [0, 2, 4]


class Mapped(Linear):
    """Batches by name, a model called by keyword, and a loss of its own."""

    def forward(self, image):
        return self.net(image)

    def training_step(self, batch, batch_idx):
        loss = smoothed(self(batch["image"]), batch["label"])
        self.log("loss", loss)
        return loss


def smoothed(logits, labels):
    return cross_entropy(logits, labels, label_smoothing=0.2)


def test_batches_by_name_and_losses_of_ones_own():
    data = [{"image": {"image": x}, "label": y} for x, y in examples()]

    class Nested(Mapped):
        def training_step(self, batch, batch_idx):
            return super().training_step(
                {"image": batch["image"]["image"], "label": batch["label"]}, batch_idx
            )

    train = torch.utils.data.DataLoader(data, batch_size=3)
    followed(Nested, monitor(1, loss_fn=smoothed), train=train)


def test_twin_of_a_network_that_bends_is_not_the_network():
    """Beside it, by hand: the same batches in a loop of one's own."""
    x, y = examples().tensors
    used = LinearizationMonitor(Probe(x, y), 4, twin=True, on_error="raise")
    done = run(Plain, [used])
    seeded()
    net = Plain().net
    start = copy.deepcopy(net)
    names = [name for name, _ in net.named_parameters()]
    theta0 = {name: p.detach().clone() for name, p in net.named_parameters()}
    theta = {name: p.clone().requires_grad_() for name, p in theta0.items()}

    def linear(x):
        change = {name: theta[name] - theta0[name] for name in names}
        value, along = torch.func.jvp(
            lambda p: torch.func.functional_call(start, p, (x,)), (theta0,), (change,)
        )
        return value + along

    optimizer = Adam([*theta.values()], 0.05)
    batches = [*loader(12)] * 2
    for xs, ys in batches:
        optimizer.zero_grad()
        cross_entropy(linear(xs), ys).backward()
        optimizer.step()
    twin = used.instrument.twin.parameters
    for name in names:
        assert torch.allclose(twin[f"net.{name}"], theta[name], atol=1e-6)
        assert not torch.allclose(done.model.net.get_parameter(name), theta[name])
    row = rows(used)[8]
    theta = {name: tensor.detach() for name, tensor in theta.items()}
    f, f0 = done.model.net(x).detach(), start(x).detach()
    distance = ((f - linear(x)).norm() / (f - f0).norm()).detach()
    assert row["twin_output_distance"] == pytest.approx(float(distance), rel=1e-4)
    assert row["twin_loss"] == pytest.approx(float(cross_entropy(linear(x), y)))
    assert row["twin_output_distance"] > 0.01


# What a monitor must not do ---------------------------------------------------------


@pytest.mark.parametrize("every", [1, "epoch"])
@pytest.mark.parametrize(
    "settings", [{}, {"options": LinearizationOptions(mode="train")}]
)
def test_training_is_the_same_to_the_last_bit(every, settings):
    def delicate(callbacks):
        return run(
            Delicate,
            callbacks,
            train=loader(15, shuffle=True),
            val=loader(6),
            accumulate_grad_batches=2,
            gradient_clip_val=0.1,
            max_steps=9,
        )

    if not settings:
        settings = {"held_out": held_out()}
    used = monitor(every, **settings)
    monitored = delicate([used])
    expected = [*range(10)] if every == 1 else [0, 3, 6, 9]
    assert [*rows(used)] == expected
    assert 0 < rows(used)[9]["twin_output_distance"] < math.inf
    assert not used.instrument.twin.lost
    recorded = monitored.trace()
    recorded["logged"] = [
        row for row in recorded["logged"] if "linear/loss" not in row[1]
    ]
    same(recorded, delicate([]).trace())


class Save(Callback):
    """A checkpoint after an update, in the middle of an epoch or at its end."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint("cut.ckpt")


class Early(Callback):
    """The batches of a step, whatever the loader has, before anybody looks at them."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        generator = torch.Generator().manual_seed(trainer.global_step)
        batch[0].copy_(torch.randn(batch[0].shape, generator=generator))
        batch[1].copy_(torch.arange(len(batch[1])) % 2)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended")
@pytest.mark.parametrize("every", [1, 3, "epoch"])
@pytest.mark.parametrize("cut", [5, 8])
def test_resumed_run_draws_the_same_curves(every, cut):
    settings = {"held_out": held_out()} if every == 3 else {}
    whole, again = monitor(every, **settings), monitor(every, **settings)
    recorder = Recorder()
    run(Plain, [Early(), whole, Save(cut)], max_steps=12)
    ends = {"max_steps": 12, "ckpt_path": "cut.ckpt", "logger": recorder}
    run(Plain, [Early(), again], **ends)
    expected = dict(whole.history)
    assert [*expected] == {1: [*range(13)], 3: [0, 3, 6, 9, 12]}.get(
        every, [0, 4, 8, 12]
    )
    assert 0 < expected[12]["linear/twin_output_distance"] < math.inf
    same(dict(again.history), expected)
    logged = {
        step: {tag: value for tag, value in row.items() if tag.startswith("linear/")}
        for step, row in recorder.rows
        if "linear/loss" in row
    }
    same(logged, {step: row for step, row in expected.items() if step > cut})
    content = torch.load("cut.ckpt", weights_only=True)["callbacks"]
    assert whole.state_key in content


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended")
def test_run_that_goes_on_after_a_last_step_off_the_schedule():
    """The measurement is forgotten, the steps of the twin are not."""
    used = monitor(3)
    seeded()
    model = Linear()
    trainer = Trainer(
        max_epochs=2,
        callbacks=[used],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(model, loader())
    assert [*rows(used)] == [0, 3, 6, 8]
    trainer.save_checkpoint("8.ckpt")
    trainer.fit_loop.max_epochs = 4
    trainer.fit(model, loader())
    assert [*rows(used)] == [0, 3, 6, 8, 9, 12, 15, 16]
    for name, tensor in model.named_parameters():
        twin = used.instrument.twin.parameters[name]
        assert torch.allclose(twin, tensor, rtol=0, atol=5e-6)
    again = monitor(3)
    resumed = run(Linear, [again], max_steps=16, ckpt_path="8.ckpt")
    assert [*rows(again)] == [0, 3, 6, 9, 12, 15, 16]
    for name, tensor in resumed.model.named_parameters():
        twin = again.instrument.twin.parameters[name]
        assert torch.allclose(twin, tensor, rtol=0, atol=5e-6)


def test_another_run_of_the_same_monitor_starts_anew():
    used = monitor(4)
    run(Plain, [used])
    first = list(used.history)
    run(Plain, [used])
    same(used.history, first)


@pytest.mark.parametrize(
    "copy_of",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "pickle"],
)
def test_copies_before_and_after_use(copy_of):
    used = copy_of(monitor(4))
    run(Plain, [used])
    again = copy_of(used)
    same(again.history, used.history)
    assert again.state_key == used.state_key
    run(Plain, [again])
    same(again.history, used.history)
    same(again.instrument.twin.parameters, used.instrument.twin.parameters)


def test_state_keys_tell_monitors_apart():
    keys = {
        LinearizationMonitor(**settings).state_key
        for settings in (
            {},
            {"every": 3},
            {"twin": True},
            {"options": LinearizationOptions(mode="train")},
            {"options": LinearizationOptions(threshold=0.5)},
            {"options": LinearizationOptions(name="linear_2")},
        )
    }
    assert len(keys) == 6


# What cannot be ---------------------------------------------------------------------


class Manual(Plain):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        x, y = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(cross_entropy(self(x), y))
        optimizer.step()


class Closed(Plain):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), 0.1)


class Sharp(Plain):
    def configure_optimizers(self):
        return Ascending(self.parameters(), 0.1)


class Elsewhere(Plain):
    """Each parameter is stepped as soon as its gradient is there."""

    def setup(self, stage):
        for parameter in self.parameters():
            parameter.register_post_accumulate_grad_hook(self.step)

    @staticmethod
    def step(parameter):
        parameter.data -= 0.1 * parameter.grad
        parameter.grad = None

    def configure_optimizers(self):
        return SGD([torch.zeros(1, requires_grad=True)], 0.1)


class Reconstructing(Plain):
    def training_step(self, batch, batch_idx):
        return (self(batch[0]) - batch[0][:, :2]).square().mean()


class Unknown(Plain):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch[:2], batch_idx)


def unlabeled():
    x, _ = examples().tensors
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=3)


def triples():
    x, y = examples().tensors
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y, y), batch_size=3
    )


@pytest.mark.parametrize(
    ("model", "settings", "what"),
    [
        (Manual, {}, "Manual optimizes manually"),
        (Closed, {}, r"LBFGS.*without a closure"),
        (Sharp, {}, "Ascending evaluates the loss more than once"),
        (Elsewhere, {}, "holds no parameter of Elsewhere"),
        (Reconstructing, {"train": unlabeled}, "cannot tell the targets"),
        (Unknown, {"train": triples}, "cannot tell inputs from targets"),
    ],
)
def test_twins_that_cannot_be_are_refused_and_the_rest_goes_on(model, settings, what):
    settings = {key: make() for key, make in settings.items()}
    probe = held_out()
    used = LinearizationMonitor(probe, 4, twin=True)
    with pytest.warns(UserWarning, match=what) as caught:
        done = run(model, [used], **settings)
    (text,) = [str(w.message) for w in caught if "twin" in str(w.message)]
    assert "LinearizationMonitor: the linearized twin is off" in text
    assert [*rows(used)] == [0, 4, 8]
    assert rows(used)[8].keys() == TAGS
    recorded = done.trace()
    recorded["logged"] = [r for r in recorded["logged"] if "linear/loss" not in r[1]]
    same(recorded, run(model, **settings).trace())
    strict = LinearizationMonitor(probe, 4, twin=True, on_error="raise")
    with pytest.raises((RuntimeError, ValueError), match=what):
        run(model, [strict], **settings)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(Trainer, "world_size", 2)
    with pytest.warns(UserWarning, match="2 processes average their gradients"):
        run(Plain, [LinearizationMonitor(4, 4, twin=True)])


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended")
def test_lost_twin_stays_lost_when_a_run_is_resumed():
    def failing(outputs, targets):
        if len(outputs) == 3:
            raise ArithmeticError("the loss is broken")
        return cross_entropy(outputs, targets)

    used = LinearizationMonitor(4, 4, twin=True, loss_fn=failing)
    with pytest.warns(UserWarning, match="twin is off.*the loss is broken"):
        run(Plain, [used, Save(6)])
    again = LinearizationMonitor(4, 4, twin=True, loss_fn=cross_entropy)
    run(Plain, [again], max_steps=12, ckpt_path="cut.ckpt")
    assert again.instrument.twin.lost
    assert rows(again)[12].keys() == TAGS


def test_monitor_that_is_off_trains_no_twin():
    def failing(outputs, targets):
        if len(outputs) == 4:
            raise ArithmeticError("the loss is broken")
        return cross_entropy(outputs, targets)

    asked = []
    used = LinearizationMonitor(4, 1, twin=True, loss_fn=failing)
    used.instrument.twin.accumulate = lambda *_: asked.append(1)
    with pytest.warns(UserWarning, match="the loss is broken"):
        run(Plain, [used])
    assert not asked  # θ₀ was never found
    assert not rows(used)


def other(loss, since=0, **settings):
    """Trained on a loss of outputs, labels and weights, from an epoch on."""

    class Module(Plain):
        def __init__(self):
            dropout, batchnorm = settings.get("dropout", 0.0), nn.Identity()
            if settings.get("batchnorm"):
                batchnorm = nn.BatchNorm1d(4)
            net = nn.Linear(3, 4), batchnorm, nn.Tanh(), nn.Dropout(dropout)
            super().__init__(nn.Sequential(*net, nn.Linear(4, 2)))

        def training_step(self, batch, batch_idx):
            x, y = batch
            if self.current_epoch < since:
                return super().training_step(batch, batch_idx)
            return loss(self(x), y, self)

    return Module


def mean(f, y, _):
    return cross_entropy(f, y)


LOSSES = {
    "sum": lambda f, y, _: cross_entropy(f, y, reduction="sum"),
    "smoothed": lambda f, y, _: smoothed(f, y),
    "weighted": lambda f, y, _: cross_entropy(f, y, torch.tensor([1.0, 1.1])),
    "penalty": lambda f, y, m: (
        mean(f, y, m) + 0.05 * sum(p.square().sum() for p in m.parameters())
    ),
    "augmented": lambda f, y, m: mean(f + 0.5 * torch.randn_like(f), y, m),
}
SETTINGS_OF_LOSSES = {
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 2, "max_steps": 4},
    "bf16": {"precision": "bf16-true"},
}
OTHER = "learns something else than the network. On a batch after step"


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("setting", SETTINGS_OF_LOSSES)
@pytest.mark.parametrize("batchnorm", [False, True])
def test_other_losses_are_told_of_once(loss, setting, batchnorm):
    model, used = other(LOSSES[loss], batchnorm=batchnorm), monitor(4)
    with pytest.warns(UserWarning, match=f"{OTHER} 0 .*loss_fn") as caught:
        watched = run(model, [used], **SETTINGS_OF_LOSSES[setting])
    assert len([w for w in caught if OTHER in str(w.message)]) == 1
    bare = run(model, **SETTINGS_OF_LOSSES[setting]).trace()
    same({**watched.trace(), "logged": bare["logged"]}, bare)


@pytest.mark.parametrize("given", [{}, {"batchnorm": True}, {"dropout": 0.5}], ids=str)
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed", "64-true"])
def test_the_same_loss_is_never_doubted(given, precision):
    """Nor any where dropout hides it."""
    run(other(mean, **given), [monitor(4)], precision=precision, max_steps=40)
    loss = (
        smoothed if "dropout" not in given else (lambda f, y: 3 * cross_entropy(f, y))
    )
    model = other(lambda f, y, _: smoothed(f, y), **given)
    run(model, [monitor(4, loss_fn=loss)], precision=precision, max_steps=8)


def test_losses_that_change_on_the_way_are_told_of():
    model = other(LOSSES["smoothed"], since=2)
    with pytest.warns(UserWarning, match=f"{OTHER} 9 "):
        run(model, [monitor(4)], max_steps=12)


def test_a_loss_is_looked_at_through_a_scaler():
    def scaled():
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        return FloatPrecision("16-mixed", "cpu", scaler)

    run(other(mean), [monitor(4)], plugins=scaled())
    with pytest.warns(UserWarning, match=f"{OTHER} 0 "):
        run(other(LOSSES["sum"]), [monitor(4)], plugins=scaled())


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_other_precisions(precision):
    used = monitor(4)
    done = run(Plain, [used], precision=precision)
    assert [*rows(used)] == [0, 4, 8]
    assert 0 < rows(used)[8]["twin_output_distance"] < 2
    same(done.trace()["weights"], run(Plain, precision=precision).trace()["weights"])


def test_held_out_probes_come_from_files():
    held_out().save("held_out.pt")
    used = monitor(8, twin=False, held_out="held_out.pt")
    run(Plain, [used])
    assert rows(used)[8].keys() == TAGS | ACCURACIES
    with pytest.raises(ValueError, match="held_out is a int"):
        LinearizationMonitor(held_out=64)

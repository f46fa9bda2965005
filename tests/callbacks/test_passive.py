"""`assert_passive` finds whoever meddles, says how, and leaves no trace itself."""

import random
import re
import warnings

import lightning.pytorch
import numpy as np
import pytest
import pytorch_lightning
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor
from monitored import (
    Delicate,
    OtherPlain,
    Plain,
    copied,
    examples,
    generator_states,
    loader,
    same,
    seeded,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ntk_callbacks import NTKMonitor, ParameterDriftMonitor, assert_passive

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but")
CPU = {"accelerator": "cpu", "num_sanity_val_steps": 0}


def delicate():
    seeded()
    return Delicate()


class Guilty(Callback):
    """Meddles after the first update."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == 1:
            self.meddle(trainer, pl_module)


def guilty(meddle):
    return type("Guilty", (Guilty,), {"meddle": staticmethod(meddle)})()


def nudge(trainer, module):
    module.net[0].weight.data[0, 0] += 1e-6


def step_of_adam(trainer, module):
    optimizer = trainer.optimizers[0]
    optimizer.state[module.net[0].weight]["exp_avg"].mul_(1.0001)


def gradient(trainer, module):
    module.net[4].bias.grad = torch.ones(2)


def one_more_batch(trainer, module):
    next(iter(trainer.train_dataloader))


GUILTY = {
    # What it does, and what the message has to name.
    "draws": (lambda t, m: torch.rand(1), "random generator of torch"),
    "draws in Python": (lambda t, m: random.random(), "random generator of Python"),
    "draws in NumPy": (lambda t, m: np.random.rand(), "random generator of NumPy"),  # noqa: NPY002
    "stays in evaluation": (
        lambda t, m: m.eval(),
        r"training flag of 'Delicate' is False, without callbacks True",
    ),
    "freezes a layer": (
        lambda t, m: m.net[5].eval(),
        "training flag of 'net.5' is False, without callbacks True",
    ),
    "moves a buffer": (
        lambda t, m: m.net[1].running_mean.add_(1),
        "buffer 'net.1.running_mean'",
    ),
    "leaves a gradient": (gradient, r"gradient of 'net.4.bias' is float32 \(2,\)"),
    "nudges a weight": (nudge, r"parameter 'net.0.weight' is float32 \(4, 3\)"),
    "freezes": (
        lambda t, m: m.net[0].bias.requires_grad_(False),
        "requires_grad of 'net.0.bias' is False",
    ),
    "hooks a module": (
        lambda t, m: m.net[3].register_forward_hook(lambda *_: None),
        "number of forward hooks on 'net.3' is 1",
    ),
    "hooks a tensor": (
        lambda t, m: m.net[0].bias.register_hook(lambda g: None),
        "number of gradient hooks on 'net.0.bias' is 1",
    ),
    "hooks an optimizer": (
        lambda t, m: t.optimizers[0].register_step_post_hook(lambda *_: None),
        "number of hooks on optimizer 0 is 1",
    ),
    "leaves an attribute": (
        lambda t, m: setattr(m.net[0], "kernel", torch.ones(2)),
        "attribute 'kernel' of 'net.0' is .* without callbacks it is not there",
    ),
    "steps the optimizer": (step_of_adam, "state of optimizer 0 for 'net.0.weight'"),
    "changes a rate": (
        lambda t, m: t.optimizers[0].param_groups[0].update(lr=0.04),
        "settings of group 0 of optimizer 0.*0.04",
    ),
    "takes a batch": (one_more_batch, "random generator of torch"),
    "stops": (lambda t, m: setattr(t, "should_stop", True), "wish to stop is True"),
    "overwrites a metric": (
        lambda t, m: m.log("loss", 1.0),
        "(logged series|metric) 'loss'",
    ),
    "changes the default dtype": (
        lambda t, m: torch.set_default_dtype(torch.float64),
        "default dtype is torch.float64",
    ),
    "turns gradients off": (
        lambda t, m: torch.set_grad_enabled(False),
        "gradient mode is False",
    ),
    "takes a thread": (lambda t, m: torch.set_num_threads(2), "number of threads is 2"),
    "filters warnings": (
        lambda t, m: warnings.simplefilter("ignore"),
        "warning filters",
    ),
}


@pytest.mark.parametrize("case", GUILTY)
def test_whoever_meddles_is_named_with_what_and_when(case):
    meddle, what = GUILTY[case]
    when = "Guilty changes the training after 1 updates, in on_train_batch_end: the "
    # Seen where it happens: after the hook of the callback, before anything else.
    with pytest.raises(AssertionError, match=when + what):
        assert_passive(
            guilty(meddle),
            delicate(),
            loader(15, shuffle=True),
            max_steps=2,
            accumulate_grad_batches=2,
            **CPU,
        )
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert torch.get_num_threads() == 1


def test_what_only_shows_between_two_updates():
    """A gradient that is half accumulated."""

    class Backward(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            pl_module.net.zero_grad()

    with pytest.raises(AssertionError, match=r"after 0 updates.*gradient of 'net.0.w"):
        assert_passive(
            Backward(), Plain(smooth()), loader(), accumulate_grad_batches=2, **CPU
        )


def smooth():
    seeded()
    return nn.Sequential(nn.Linear(3, 2))


def test_averaged_weights_are_no_matter_of_watching():
    with pytest.raises(AssertionError, match="EMAWeightAveraging changes the training"):
        assert_passive(EMAWeightAveraging(), delicate(), loader(), **CPU)


NAMESPACES = {Plain: lightning.pytorch, OtherPlain: pytorch_lightning}


@pytest.mark.parametrize("kind", NAMESPACES)
def test_watchers_pass(kind, tmp_path):
    class Logs(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            pl_module.log("mine", 1.0)
            trainer.logger.log_metrics({"direct": 2.0}, step=trainer.global_step)

    watchers = [
        *(NTKMonitor(4, 2, on_error="raise"), ParameterDriftMonitor(1)),
        *(LearningRateMonitor(), Logs()),
        NAMESPACES[kind].callbacks.ModelCheckpoint(tmp_path),
    ]
    assert_passive(watchers, kind(), loader(), max_epochs=2, **CPU)


def test_nothing_that_is_given_changes():
    class Counts(Callback):
        calls = 0

        def on_train_batch_end(self, *_):
            self.calls += 1

    model, callback = delicate(), Counts()
    model.net[0].weight.grad = torch.ones(4, 3)
    own = torch.Generator().manual_seed(5)
    data = DataLoader(examples(), batch_size=3, shuffle=True, generator=own)
    before = copied(model.state_dict()), own.get_state(), generator_states()
    modes = [part.training for part in model.modules()]
    assert_passive(callback, model, data, **CPU)
    same(before, (copied(model.state_dict()), own.get_state(), generator_states()))
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(model.net[0].weight.grad, torch.ones(4, 3))
    assert callback.calls == 0
    assert model._trainer is None


def test_module_and_data_module_that_a_trainer_holds():
    class Data(lightning.pytorch.LightningDataModule):
        def train_dataloader(self):
            return loader()

        def val_dataloader(self):
            return loader(3)

    model, data = delicate(), Data()
    trainer = lightning.pytorch.Trainer(
        max_steps=1, logger=False, enable_checkpointing=False, **CPU
    )
    trainer.fit(model, data)
    assert_passive(ParameterDriftMonitor(2), model, data, **CPU)
    assert model.trainer is trainer
    with pytest.raises(AssertionError, match=r"in on_validation_end: the .*torch"):
        assert_passive(OnValidation(), model, data, **CPU)
    assert trainer.global_step == 1


class OnValidation(Callback):
    def on_validation_end(self, *_):
        torch.rand(1)


COUNTER = iter(range(100))


class Restless(Plain):
    """Never the same twice."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1 + next(COUNTER))


def test_training_that_does_not_repeat_itself_is_not_blamed_on_a_callback():
    with pytest.raises(AssertionError, match="two runs without any callback differ"):
        assert_passive(ParameterDriftMonitor(), Restless(), loader(), **CPU)


def test_what_cannot_be_copied_is_refused_with_a_way_out():
    batches = (batch for batch in loader())
    with pytest.raises(
        TypeError, match=r"generator cannot be copied.*a loader instead"
    ):
        assert_passive(ParameterDriftMonitor(), Plain(), batches, **CPU)


def test_no_data_is_no_proof():
    empty = DataLoader(TensorDataset(torch.empty(0, 3), torch.empty(0)), batch_size=2)
    with (
        pytest.warns(UserWarning, match="is zero. Please make sure"),
        pytest.raises(ValueError, match="made no step"),
    ):
        assert_passive(ParameterDriftMonitor(), Plain(), empty, **CPU)


def test_callbacks_of_the_other_namespace():
    class Draws(pytorch_lightning.Callback):
        def on_train_start(self, *_):
            torch.rand(1)

    with pytest.raises(AssertionError, match=re.escape("Draws changes the training")):
        assert_passive(Draws(), OtherPlain(), loader(), **CPU)

"""Training with monitors is training without them, to the last bit."""

import random

import numpy as np
import pytest
import torch
from delicate import bare_trace, delicate_run
from lightning.pytorch import Callback
from monitored import (
    MONITORS,
    Delicate,
    Plain,
    all_monitors,
    copied,
    fit,
    generator_states,
    loader,
    same,
    seeded,
)
from torch import nn
from torch.nn.functional import cross_entropy

from ntk_callbacks import (
    FeatureMonitor,
    JacobianMonitor,
    LinearizationMonitor,
    LinearizationOptions,
    NTKMonitor,
    NTKOptions,
    PredictionMonitor,
    SignalMonitor,
)


class HalfWay(Callback):
    """Looks at what is only there between two updates."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        gradients = [p.grad for p in pl_module.parameters()]
        self.seen.append((copied(gradients), generator_states()))


def test_nothing_of_a_delicate_run_changes():
    """Modes 1-8: chance, training flags, frozen layers, buffers, gradients that are
    half accumulated, the order of a shuffled loader."""
    watch, watch_bare = HalfWay(), HalfWay()
    monitored = delicate_run([*all_monitors(every=1), watch])
    bare = delicate_run([watch_bare])
    assert [*monitored.recorder.measured()] == [*range(10)]  # 3 epochs of 5 batches
    same(monitored.trace(), bare.trace())
    same(watch.seen, watch_bare.seen)
    assert any(g is not None for gradients, _ in watch.seen for g in gradients)


@pytest.mark.parametrize("name", MONITORS)
def test_each_monitor_alone_changes_nothing(name):
    monitored = delicate_run(MONITORS[name]("epoch", 4))
    assert [*monitored.recorder.measured()] == [0, 3, 6, 9]
    same(monitored.trace(), bare_trace())


def test_train_mode_kernel_moves_no_statistics():
    """Modes 2 and 4: BatchNorm on batch statistics, measured as it trains."""
    train = LinearizationOptions(mode="train")
    monitors = [
        NTKMonitor(4, 1, options=NTKOptions(mode="train"), on_error="raise"),
        JacobianMonitor(4, 1, mode="train", on_error="raise"),
        PredictionMonitor(4, 1, mode="train", on_error="raise"),
        SignalMonitor(4, 1, mode="train", on_error="raise"),
        FeatureMonitor(4, 1, mode="train", on_error="raise"),
        LinearizationMonitor(4, 1, twin=True, options=train, on_error="raise"),
    ]
    monitored = delicate_run(monitors)
    assert len(monitored.recorder.measured()) == 10
    same(monitored.trace(), bare_trace())


def test_layer_frozen_in_on_train_start_stays_frozen():
    """Mode 2: `train()` after a measurement must not wake what a user put to sleep."""

    class Frozen(Delicate):
        def train(self, mode=True):
            return nn.Module.train(self, mode)

        def on_train_start(self):
            self.net[5].eval()

    def run(callbacks):
        seeded()
        return fit(Frozen(), callbacks, val=loader(6), max_epochs=2)

    monitored = run(all_monitors(every=1))
    same(monitored.trace(), run([]).trace())
    assert not monitored.model.net[5].training
    assert monitored.model.net[1].training


class Vandal:
    """An `output_fn` that breaks what it can reach, then raises at its second call."""

    def __init__(self):
        self.calls = 0

    def meet(self, model):
        """Past the copies that a measurement works on."""
        self.model = model
        self.parameters = [*model.parameters()]
        self.buffers = [*model.buffers()]

    def __call__(self, module, x):
        self.calls += 1
        if self.calls != 2:
            return module(x)
        real = self.model
        real.net.train()
        real.net[5].train()
        for buffer in self.buffers:
            buffer.add_(1)
        with torch.enable_grad():
            sum(parameter.sum() for parameter in self.parameters).backward()
        self.parameters[-1].grad = torch.full_like(self.parameters[-1], 9.0)
        for parameter in self.parameters:
            parameter.data.mul_(2)
        self.parameters[0].data = torch.zeros(4, 3)
        self.parameters[0].requires_grad_(False)
        real.net[0].extra = 1
        real.net[0].register_forward_hook(lambda *_: None)
        real.net.append(nn.Linear(2, 2))
        random.random()
        np.random.rand()  # noqa: NPY002
        torch.rand(5)
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True)
        torch.set_float32_matmul_precision("medium")
        raise RuntimeError("the vandal was here")


class Acquaint(Callback):
    def __init__(self, vandal):
        self.vandal = vandal

    def on_fit_start(self, trainer, pl_module):
        self.vandal.meet(pl_module)


@pytest.mark.parametrize("kind", [NTKMonitor, JacobianMonitor])
@pytest.mark.parametrize("first", [0, 3], ids=["at the start", "mid-accumulation"])
def test_failed_measurement_changes_nothing(kind, first):
    """Modes 3, 20, 21: an exception halfway through a measurement."""
    vandal = Vandal()
    vandal.calls = 0 if first == 0 else -100
    monitor = kind(4, every=1, output_fn=vandal)

    class Later(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == first:
                vandal.calls = 0

    callbacks = [Acquaint(vandal), monitor]
    with pytest.warns(UserWarning, match="the vandal was here.*training goes on"):
        monitored = delicate_run([*callbacks, *([Later()] if first else [])])
    same(monitored.trace(), bare_trace())
    skipped = {0: 0, 3: 4}[first]
    assert [*monitored.recorder.measured()] == [s for s in range(10) if s != skipped]
    assert not hasattr(monitored.model.net[0], "extra")
    assert not monitored.model.net[0]._forward_hooks
    assert torch.get_default_dtype() == torch.float32
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_float32_matmul_precision() == "highest"


def test_module_keeps_its_keys_attributes_and_hooks():
    """Modes 21 and 23: nothing is left on the module, nothing in its state."""
    model = Delicate()
    keys = [*model.state_dict()]
    attributes = {name: {*vars(part)} for name, part in model.named_modules()}
    hooks = [name for name in vars(model) if name.endswith("_hooks")]
    assert len(hooks) > 5
    run = fit(model, all_monitors(every=1), val=loader(6))
    assert run.recorder.measured()
    assert [*model.state_dict()] == keys
    bare = Delicate()
    fit(bare, val=loader(6))
    for (name, part), plain in zip(model.named_modules(), bare.modules(), strict=True):
        assert {*vars(part)} == {*vars(plain)}, name
        assert {*vars(part)} >= attributes[name]
        for hook in hooks:
            assert len(getattr(part, hook)) == len(getattr(plain, hook)), (name, hook)


def test_unused_and_frozen_parameters_keep_their_missing_gradients():
    """Mode 5: `.grad` of what the loss does not use stays None."""

    class Spare(Plain):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(2, 2)
            self.net[0].bias.requires_grad_(False)

    run = fit(Spare(), all_monitors(every=1), max_steps=3)
    assert len(run.recorder.measured()) == 4
    assert run.model.spare.weight.grad is None
    assert run.model.net[0].bias.grad is None
    assert not run.model.net[0].bias.requires_grad


def test_graph_that_the_user_holds_over_an_update_stays_valid():
    """A loss of the last batch, differentiated in the next one."""

    class Holding(Plain):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.held = None

        def training_step(self, batch, batch_idx):
            x, y = batch
            if self.held is not None:
                self.held.backward()
                self.optimizers().step()
                self.optimizers().zero_grad()
            self.held = cross_entropy(self(x), y)

    def run(callbacks):
        seeded()
        return fit(Holding(), callbacks, max_epochs=2)

    monitored = run(all_monitors(every=1, twin=False))
    assert len(monitored.recorder.measured()) > 3
    same(copied(monitored.model.state_dict()), copied(run([]).model.state_dict()))

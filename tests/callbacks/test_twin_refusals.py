"""Twins that cannot be are refused, and the rest goes on."""

import pytest
import torch
from interrupted import Save
from lightning.pytorch import Trainer
from linearized import TAGS, held_out, rows, run
from monitored import Ascending, Plain, examples, same
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from ntk_callbacks.callbacks.linearization import LinearizationMonitor


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

"""A linearized twin follows the trainer step by step, whatever a step is."""

import copy
import math

import pytest
import torch
from linearized import Linear, held_out, monitor, rows, run, smoothed
from monitored import FloatPrecision, Plain, examples, loader, same, seeded
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, AdamW

from ntk_callbacks import Probe
from ntk_callbacks.callbacks.linearization import LinearizationMonitor


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


def test_batches_by_name_and_losses_of_ones_own():
    data = [{"image": {"image": x}, "label": y} for x, y in examples()]

    class Nested(Mapped):
        def training_step(self, batch, batch_idx):
            return super().training_step(
                {"image": batch["image"]["image"], "label": batch["label"]}, batch_idx
            )

    train = torch.utils.data.DataLoader(data, batch_size=3)
    followed(Nested, monitor(1, loss_fn=smoothed), train=train)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning")  # of jvp
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

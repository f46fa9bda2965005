"""Updates that move nothing, or something else: what is predicted then."""

import math

import pytest
import torch
from monitored import FloatPrecision, Plain, examples, fit, same, seeded
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from ntk_callbacks import (
    LinearizationMonitor,
    NTKMonitor,
    NTKOptions,
    PredictionMonitor,
    Probe,
)

X = examples().tensors[0]
Y = torch.stack([X.sum(1), X.square().sum(1)], 1)


def half_mean(outputs, targets):
    return 0.5 * (outputs - targets).square().sum() / len(outputs)


class Regression(Plain):
    """Linear, on all examples at once: modes decay exactly as predicted."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(3, 2)))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = half_mean(self(x), y)
        self.log("loss", loss)
        return loss

    optimizer = staticmethod(lambda parameters: SGD(parameters, lr=0.3))

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


def swinging(parameters):
    return SGD(parameters, lr=0.15, momentum=0.8, nesterov=True)


class Dropping(Regression):
    """The second of three batches has no loss."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx % 3 == 1 else loss


class Overflowing(Regression):
    """The loss of the second update is not finite."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * (math.inf if self.global_step == 1 else 1.0)


def batches(n):
    return DataLoader(TensorDataset(X.repeat(n, 1), Y.repeat(n, 1)), batch_size=len(X))


def ntk(every):
    return NTKMonitor(
        Probe(X, Y),
        every,
        metrics=["residual_modes"],
        options=NTKOptions(loss="half_mean", history=False),
        on_error="raise",
    )


def scaled():
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    return {"plugins": FloatPrecision("16-mixed", "cpu", scaler)}


def decays(used, which, step):
    """Of the modes in which there is a residual that is not round-off."""
    row = dict(used.history)[step]
    large = [k for k in range(1, 7) if row[f"ntk_modes/residual/{k}"] > 1e-4]
    assert len(large) > 2
    return [row[f"ntk_modes/decay_{which}/{k}"] for k in large]


@pytest.mark.filterwarnings("ignore:.*returned `None`")  # Lightning, once a process
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize(
    ("model", "settings"),
    [(Dropping, dict), (Dropping, scaled), (Overflowing, scaled)],
    ids=["no loss", "no loss for a scaler", "skipped by a scaler"],
)
def test_decays_leave_out_updates_that_move_nothing(every, momentum, model, settings):
    used, trained = ntk(every), model()
    if momentum:
        trained.optimizer = swinging
    seeded()
    fit(trained, [used], train=batches(3), max_epochs=1, **settings())
    for step in range(every, 4, every):
        measured = decays(used, "measured", step)
        assert decays(used, "predicted", step) == pytest.approx(measured, rel=2e-4)
        assert (measured == [1.0] * len(measured)) == (every == 1 and step == 2)


@pytest.mark.parametrize(("limit", "clipped"), [(0.3, True), (1e3, False)])
@pytest.mark.parametrize("rule", ["norm", "value", "own"])
@pytest.mark.parametrize("momentum", [False, True])
def test_decays_of_clipped_steps_are_right_or_unknown(limit, clipped, rule, momentum):
    class Own(Regression):
        def configure_gradient_clipping(self, optimizer, **_):
            nn.utils.clip_grad_norm_(self.parameters(), limit)

    used, model = ntk(2), Own() if rule == "own" else Regression()
    settings = {"gradient_clip_val": limit, "gradient_clip_algorithm": rule}
    settings = {} if rule == "own" else settings
    if momentum:
        model.optimizer = swinging
    fit(model, [used], train=batches(4), max_epochs=1, **settings)
    for step in (2, 4):
        measured, predicted = (decays(used, w, step) for w in ("measured", "predicted"))
        if rule == "own" or (clipped and rule == "value"):
            assert all(map(math.isnan, predicted))
        else:
            assert predicted == pytest.approx(measured, rel=2e-4)


@pytest.mark.filterwarnings("ignore:.*returned `None`")  # Lightning, once a process
def test_a_scaler_skips_steps_without_a_last_loss_though_others_wait():
    class Late(Dropping):
        """Of each two batches that make a step, the fourth has no loss."""

        def training_step(self, batch, batch_idx):
            loss = Regression.training_step(self, batch, batch_idx)
            return None if batch_idx == 3 else loss

    def run(callbacks):
        seeded()
        given = {"train": batches(6), "max_epochs": 1, "accumulate_grad_batches": 2}
        return fit(Late(), callbacks, **given, **scaled())

    probe = {"probe": Probe(X, Y), "every": 1, "loss_fn": half_mean}
    modes = ntk(1)
    foretold = PredictionMonitor(**probe, on_error="raise")
    linear = LinearizationMonitor(**probe, twin=True, on_error="raise")
    watched = run([modes, foretold, linear])
    steps = dict(foretold.history)
    assert [steps[k]["prediction/step_error"] for k in (1, 2, 3)] == [0.0] * 3
    moved = [steps[k]["prediction/loss_change_actual"] for k in (1, 2, 3)]
    assert [change == 0.0 for change in moved] == [False, True, False]
    for k in (1, 2, 3):
        assert dict(linear.history)[k]["linear/twin_output_distance"] < 1e-5
        measured = decays(modes, "measured", k)
        assert decays(modes, "predicted", k) == pytest.approx(measured, rel=2e-4)
    bare = run([]).trace()
    same({**watched.trace(), "logged": bare["logged"]}, bare)


def test_a_scaler_looks_into_sparse_gradients():
    class Tokens(Plain):
        def __init__(self):
            super().__init__(nn.Embedding(5, 2, sparse=True))

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * (math.inf if self.global_step == 1 else 1.0)

        def configure_optimizers(self):
            return SGD(self.parameters(), lr=0.3)

    data = TensorDataset(torch.arange(10) % 5, torch.arange(10) % 2)
    used = PredictionMonitor(4, 1, on_error="raise")
    fit(Tokens(), [used], train=DataLoader(data, 5), max_steps=3, **scaled())
    found = dict(used.history)
    assert [found[k]["prediction/step_error"] for k in (1, 2, 3)] == [0.0] * 3
    changes = [found[k]["prediction/loss_change_optimizer"] for k in (1, 2, 3)]
    assert [change == 0.0 for change in changes] == [False, True, False]


@pytest.mark.parametrize("how", ["thawed", "held from then on"])
def test_no_decay_is_predicted_by_the_kernel_of_other_parameters(how):
    class Thawing(Regression):
        def __init__(self):
            super().__init__()
            self.net.append(nn.Linear(2, 2))
            self.net[0].requires_grad_(how != "thawed")

        def on_train_epoch_start(self):
            if self.current_epoch == 2 and how == "thawed":
                self.net[0].requires_grad_(True)
            elif self.current_epoch == 2:
                first = {"params": [*self.net[0].parameters()]}
                self.optimizers().add_param_group(first)

        def configure_optimizers(self):
            of = self if how == "thawed" else self.net[1]
            return SGD(of.parameters(), lr=0.01)

    used = ntk(1)
    seeded()
    fit(Thawing(), [used], train=batches(1), max_epochs=5)
    for step in range(1, 6):
        row = dict(used.history)[step]
        predicted = [row.get(f"ntk_modes/decay_predicted/{k}") for k in range(1, 4)]
        measured = [row[f"ntk_modes/decay_measured/{k}"] for k in range(1, 4)]
        if step == 3:  # begun with the kernel of the last layer, or of one that stood
            assert all(map(math.isnan, predicted))
        elif step < 3 and how != "thawed":
            assert predicted == [None] * 3
        else:
            assert predicted == pytest.approx(measured, rel=0.01)

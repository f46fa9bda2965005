"""Loss spikes and learning-rate changes are measured, in a resumed run as well."""

import math
import statistics

import pytest
import torch
from monitored import Plain, fit, same, seeded
from torch.nn.functional import cross_entropy

from ntk_callbacks import (
    ParameterDriftMonitor,
    PredictionMonitor,
    either,
    learning_rate_change,
    loss_spike,
)
from ntk_callbacks.callbacks.when import When


def steps_of(schedule, model=None, **settings):
    monitor = ParameterDriftMonitor(schedule, on_error="raise")
    fit(model or Plain(), [monitor], **settings)
    return [step for step, _ in monitor.history]


class Spiky(Plain):
    """The loss is multiplied in given batches, counted from 1 over the whole run."""

    def __init__(self, factors):
        super().__init__()
        self.factors = factors
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    def training_step(self, batch, batch_idx):
        self.batches += 1
        factor = self.factors.get(int(self.batches), 1.0)
        x, y = batch
        return factor * cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_spike_is_measured_after_the_update_that_begins_it():
    factors = {13: 50.0, 14: 60.0, 22: 1e4}
    found = steps_of(loss_spike(4, over=8), Spiky(factors), max_epochs=7)
    assert found == [0, 13, 22, 28]


def test_no_spike_before_enough_losses_were_seen():
    assert steps_of(loss_spike(4, over=8), Spiky({5: 50.0}), max_steps=8) == [0, 8]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite(value):
    factors = {12: value, 13: value}
    found = steps_of("loss spike", Spiky(factors), max_steps=16)
    assert found == [0, 16]  # fewer than 50 updates were seen
    found = steps_of(loss_spike(over=4), Spiky(factors), max_steps=16)
    assert found == [0, 12, 16]  # it goes on at 13


def test_spike_in_the_sum_of_accumulated_losses():
    """Each of the two batches alone is no spike, the update is; and the reverse."""
    factors = {21: 4.0, 22: 4.0}
    found = steps_of(
        loss_spike(12, over=6), Spiky(factors), max_epochs=7, accumulate_grad_batches=2
    )
    assert found == [0, 11, 14]


def test_weights_fall_exponentially_over_the_window():
    """Beside the textbook recursion, written with lists of weights."""
    over, deviations = 5, 2.5
    generator = torch.Generator().manual_seed(0)
    losses = (torch.rand(300, generator=generator) ** 8).tolist()
    watch = When(loss_spike(deviations, over), "test")
    found, expected, high = [], [], False
    for step, loss in enumerate(losses, 1):
        watch.note_loss(step, torch.tensor(loss, dtype=torch.float64))
        watch.note_update(step, [0.1])
        if watch.due(step):
            found.append(step)
        past = losses[: step - 1]
        shares = [max(1 / (i + 1), 1 / over) for i in range(len(past))]
        weights = [
            share * math.prod(1 - later for later in shares[i + 1 :])
            for i, share in enumerate(shares)
        ]
        if len(past) >= over:
            assert sum(weights) == pytest.approx(1)
            mean = sum(w * x for w, x in zip(weights, past, strict=True))
            square = sum(
                w * (x - mean) ** 2 for w, x in zip(weights, past, strict=True)
            )
            spike = loss - mean > deviations * square**0.5
            if spike and not high:
                expected.append(step)
            high = spike
        else:
            high = len(past) > 0 and loss > statistics.mean(past) + deviations * (
                statistics.pstdev(past)
            )
    assert found == expected
    assert len(found) > 3


def test_loss_is_not_read_where_no_event_asks_for_it():
    class Unreadable:
        def detach(self):
            raise AssertionError("read")

    When(either("epoch", learning_rate_change()), "test").note_loss(1, Unreadable())


class Scheduled(Plain):
    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        rule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        return [optimizer], [{"scheduler": rule, "interval": "step"}]


@pytest.mark.parametrize(
    ("rate", "factor", "expected"),
    [
        (lambda done: 0.1 ** (done // 5), 10, [0, 6, 11, 16]),
        (lambda done: 0.8**done, 2, [0, 5, 9, 13, 16]),
        (lambda done: 1.0 - done / 100, 2, [0, 16]),
        (lambda done: min(done, 4) / 4, 2, [0, 2, 3, 5, 16]),  # warmup from nothing
        (lambda done: 1.0 if done < 8 else 0.0, 2, [0, 9, 16]),
    ],
    ids=["steps", "exponential", "slow", "warmup", "zero"],
)
def test_first_update_with_a_new_rate(rate, factor, expected):
    found = steps_of(learning_rate_change(factor), Scheduled(rate), max_steps=16)
    assert found == expected


def test_any_parameter_group_counts():
    watch = When(learning_rate_change(), "test")
    rates = [[1.0, 1.0], [1.0, 0.9], [1.0, 0.4], [1.0, 0.4], [1.0, 0.4, 0.1]]
    for step, given in enumerate(rates, 1):
        watch.note_update(step, given)
        assert watch.due(step) == (step in (3, 5))


def test_prediction_knows_of_events_beforehand():
    """It has to be made before the update that is measured."""
    schedule = either("at 3", learning_rate_change(10), loss_spike(4, over=8))

    class Both(Spiky):
        def configure_optimizers(self):
            return Scheduled.configure_optimizers(self)

        rate = staticmethod(lambda done: 0.1 if done < 10 else 0.001)

    monitor = PredictionMonitor(4, schedule, on_error="raise")
    fit(Both({14: 50.0}), [monitor], max_epochs=5)
    found = dict(monitor.history)
    assert [*found] == [0, 3, 11, 14, 20]
    assert all("prediction/explained" in found[step] for step in (3, 11, 14, 20))


class Eventful(Plain):
    """Data and loss by the step alone, so that a resumed loader does not matter."""

    def training_step(self, batch, batch_idx):
        generator = torch.Generator().manual_seed(self.global_step)
        x = torch.randn(6, 3, generator=generator)
        factor = {12: 50.0, 15: 1e3, 16: 1e3}.get(self.global_step, 1.0)
        for group in self.optimizers().param_groups:
            group["lr"] = 0.01 * 0.8 ** (self.global_step // 4)
        return factor * cross_entropy(self(x), torch.arange(6) % 2)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended")
@pytest.mark.parametrize("stop", [4, 6, 12, 14, 16])
def test_resumed_run_sees_the_events_of_an_unbroken_one(stop):
    """The window of the losses, the rates compared with, and a spike that goes on."""
    schedule = either(loss_spike(4, over=8), learning_rate_change(1.5))

    def run(**settings):
        seeded()
        monitor = ParameterDriftMonitor(schedule, on_error="raise")
        return fit(Eventful(), [monitor], **settings), monitor.history

    _, whole = run(max_steps=20)
    assert [step for step, _ in whole] == [0, 9, 13, 16, 17, 20]
    broken, _ = run(max_steps=stop)
    broken.trainer.save_checkpoint("stop.ckpt")
    _, resumed = run(max_steps=20, ckpt_path="stop.ckpt")
    same(whole, resumed)

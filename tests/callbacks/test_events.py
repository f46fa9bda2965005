"""Loss spikes, learning-rate changes, and a limit on the time that measuring takes."""

import itertools
import logging
import math
import statistics

import pytest
import torch
from lightning.pytorch import Callback
from monitored import Plain, fit, same, seeded
from torch.nn.functional import cross_entropy

from ntk_callbacks import (
    ParameterDriftMonitor,
    PredictionMonitor,
    at,
    capped,
    either,
    every,
    learning_rate_change,
    loss_spike,
)
from ntk_callbacks.callbacks import when
from ntk_callbacks.callbacks.as_schedule import as_schedule
from ntk_callbacks.callbacks.when import When


def steps_of(schedule, model=None, **settings):
    monitor = ParameterDriftMonitor(schedule, on_error="raise")
    fit(model or Plain(), [monitor], **settings)
    return [step for step, _ in monitor.history]


# Loss spikes --------------------------------------------------------------------------


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


# Learning rates -----------------------------------------------------------------------


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


# Resume -------------------------------------------------------------------------------


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


# Overhead -----------------------------------------------------------------------------


class Clock:
    """Time that goes by only when told to."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


def test_measurements_that_would_cost_too_much_are_left_out(monkeypatch):
    """A step of 1 s; measuring takes 0.5 s, from step 101 on 3 s; at most a tenth."""
    clock = Clock()
    monkeypatch.setattr(when, "time", clock)
    watch = When(capped(1, 0.1), "test")
    measured, spent, last = [], 0.0, 0.0
    for step in range(1, 200):
        clock.now += 1.0
        due = watch.due(step)
        assert due == (spent + last <= 0.1 * step + 1e-9)
        clock.now += 50.0
        assert watch.due(step) == due  # asked again later, it answers the same
        clock.now -= 50.0
        if due:
            last = 3.0 if step > 100 else 0.5
            clock.now += last
            watch.spent(last)
            spent += last
            measured.append(step)
    assert measured[:4] == [1, 10, 15, 20]
    assert measured[-1] - measured[-2] == 30


def test_what_is_prepared_before_a_measurement_counts_with_it(monkeypatch):
    """Of 0.5 s each, 0.4 s before the update."""
    clock = Clock()
    monkeypatch.setattr(when, "time", clock)
    watch = When(capped(1, 0.1), "test")
    measured = []
    for step in range(1, 30):
        clock.now += 1.0
        if watch.due(step):
            clock.now += 0.5
            watch.prepared(0.4)
            watch.spent(0.1)
            measured.append(step)
    assert measured == [1, 10, 15, 20, 25]


class Slowly(Callback):
    """Every batch takes a second, every measurement two."""

    def __init__(self, clock):
        self.clock = clock

    def on_train_batch_start(self, *_):
        self.clock.now += 1.0


class Measured(ParameterDriftMonitor):
    clock = None

    def _report(self, *arguments):
        self.clock.now += 2.0
        super()._report(*arguments)


def test_overhead_of_a_run(monkeypatch, caplog):
    clock = Clock()
    monkeypatch.setattr(when, "time", clock)
    monkeypatch.setattr("ntk_callbacks.callbacks.monitor.time", clock)
    monkeypatch.setattr(Measured, "clock", clock)
    monitor = Measured("1 steps, max_overhead=0.25", on_error="raise")
    with caplog.at_level(logging.INFO):
        fit(Plain(), [Slowly(clock), monitor], max_steps=40)
    steps = [step for step, _ in monitor.history]
    # The k-th takes the sum to 2 k seconds, at most a quarter of the steps so far; the
    # last comes in any case.
    assert steps == [0, 16, 24, 32, 40]
    said = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert said == [
        "Measured: a measurement takes 2 s; some that are due are left out, so that "
        "all together take at most 0.25 of the time of training."
    ]


# As text ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("loss spike", loss_spike()),
        ("Learning-rate change", learning_rate_change()),
        ("epoch, loss spikes", either("epoch", loss_spike())),
        (
            "epoch, at 1 10 , learning rate changes",
            either("epoch", at(1, 10), learning_rate_change()),
        ),
        ("5 per decade, max_overhead=0.05", capped("5 per decade", 0.05)),
        (
            "epoch, loss spike, max_overhead = .01",
            capped(either("epoch", loss_spike()), 0.01),
        ),
    ],
)
def test_texts(text, expected):
    found = as_schedule(text)
    assert found.text == expected.text
    assert found.events == expected.events
    assert found.max_overhead == expected.max_overhead
    for step, epoch in itertools.product(range(1, 25), (None, 1)):
        assert found.due(step, epoch) == expected.due(step, epoch)


def test_text_of_a_schedule_names_all_of_it():
    schedule = capped(either(every(3), "epoch", loss_spike(3, 9), every(3)), 0.5)
    assert schedule.text == (
        "3 steps, 1 epochs, loss spike (3 deviations over 9 updates), max_overhead=0.5"
    )
    assert capped(schedule, 0.1).text.endswith("9 updates), max_overhead=0.1")
    tightest = either(schedule, capped("epoch", 0.2))
    assert tightest.max_overhead == 0.2
    assert tightest.text.count("max_overhead") == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: loss_spike(0),
        lambda: loss_spike(-1.0),
        lambda: loss_spike(math.nan),
        lambda: loss_spike("big"),
        lambda: loss_spike(over=1),
        lambda: loss_spike(over=2.5),
        lambda: learning_rate_change(1),
        lambda: learning_rate_change(0.1),
        lambda: learning_rate_change("big"),
        either,
        lambda: either("epoch", "now"),
        lambda: capped("epoch", 0),
        lambda: capped("epoch", -0.1),
        lambda: capped("epoch", "5%"),
        lambda: capped("epoch", math.nan),
        lambda: capped("epoch", math.inf),
        lambda: capped("epoch", True),
        lambda: as_schedule("epoch, max_overhead=0"),
        lambda: as_schedule("max_overhead=0.1"),
        lambda: as_schedule("epoch, 10"),
        lambda: as_schedule("at 1, 10"),
        lambda: as_schedule("epoch,"),
    ],
)
def test_what_makes_no_schedule(make):
    with pytest.raises(ValueError, match=r"expected|at least"):
        make()

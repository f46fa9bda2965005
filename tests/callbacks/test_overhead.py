"""A limit on the time that measuring takes leaves measurements out."""

import logging

from lightning.pytorch import Callback
from monitored import Plain, fit

from ntk_callbacks import ParameterDriftMonitor, capped
from ntk_callbacks.callbacks import when
from ntk_callbacks.callbacks.as_schedule import as_schedule
from ntk_callbacks.callbacks.when import When


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
        "Measured: a measurement takes 2 s. Some that are due are left out, so that "
        "all together take at most 0.25 of the time of training."
    ]


def test_a_long_measurement_says_once_what_makes_it_cheaper(caplog):
    watch = When(as_schedule("epoch"), "test")
    with caplog.at_level(logging.INFO):
        for seconds in (0.5, 9.0, 21.0, 33.0):
            watch.prepared(0.5)
            watch.spent(seconds)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("test: a measurement takes 22 s. Fewer examples or outputs")
    assert "max_overhead=0.05" in said

"""Schedules of events as text, and what makes no schedule."""

import itertools
import math

import pytest

from ntk_callbacks import at, capped, either, every, learning_rate_change, loss_spike
from ntk_callbacks.callbacks.as_schedule import as_schedule


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

"""Schedules as predicates, for any step."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntk_callbacks import at, every, log_spaced
from ntk_callbacks.callbacks.as_schedule import as_schedule
from ntk_callbacks.callbacks.schedule import Schedule

positive = st.integers(1, 10**6)
steps = st.integers(1, 10**12)


@given(n=positive, step=steps, epoch=st.none() | positive)
def test_every_n_steps(n, step, epoch):
    assert every(n).due(step, epoch) == (step % n == 0)


@given(n=positive, step=steps, epoch=positive)
def test_every_n_epochs(n, step, epoch):
    schedule = every(n, "epochs")
    assert schedule.due(step, epoch) == (epoch % n == 0)
    assert not schedule.due(step)


@given(per_decade=st.integers(1, 40), index=st.integers(0, 400))
@settings(max_examples=300)
def test_log_spaced_measures_every_point_of_its_grid(per_decade, index):
    index %= 12 * per_decade  # up to 10^12
    assert log_spaced(per_decade).due(round(10 ** (index / per_decade)))


@given(per_decade=st.integers(1, 40), step=st.integers(1, 10**9))
@settings(max_examples=300)
def test_log_spaced_measures_nothing_else(per_decade, step):
    # The grid point nearest in log; all others round to something farther away.
    near = round(per_decade * math.log10(step))
    grid = {round(10 ** (i / per_decade)) for i in range(max(near - 2, 0), near + 3)}
    assert log_spaced(per_decade).due(step) == (step in grid)


@given(per_decade=st.integers(1, 20), decades=st.integers(1, 4))
@settings(max_examples=30)
def test_log_spaced_counts_what_it_says(per_decade, decades):
    due = [s for s in range(1, 10**decades + 1) if log_spaced(per_decade).due(s)]
    grid = {round(10 ** (i / per_decade)) for i in range(per_decade * decades + 1)}
    assert due == sorted(grid)
    assert {10**k for k in range(decades + 1)} <= {*due}


@given(chosen=st.lists(st.integers(0, 10**6), min_size=1), step=steps)
def test_at(chosen, step):
    assert at(*chosen).due(step) == (step in chosen)
    assert all(at(*chosen).due(s) for s in chosen)


@given(
    schedule=st.one_of(
        st.builds(every, positive, st.sampled_from(["steps", "epochs"])),
        st.builds(log_spaced, st.integers(1, 100)),
        st.lists(st.integers(0, 10**6), min_size=1, max_size=9).map(lambda s: at(*s)),
    ),
    step=steps,
    epoch=st.none() | positive,
)
def test_text_of_a_schedule_is_read_back(schedule, step, epoch):
    """Its text names it in checkpoints; configuration files hold such texts."""
    again = as_schedule(schedule.text)
    assert again.text == schedule.text
    assert again.due(step, epoch) == schedule.due(step, epoch)


@given(n=positive)
def test_spellings_of_one_schedule(n):
    texts = {as_schedule(v).text for v in (n, str(n), f"{n} steps", f" {n} STEPS ")}
    assert texts == {f"{n} steps"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("epoch", "1 epochs"),
        ("epochs", "1 epochs"),
        ("1 epoch", "1 epochs"),
        ("step", "1 steps"),
        ("At 100 1", "at 1 100"),
        ("3 per decade", "3 per decade"),
    ],
)
def test_texts_in_words(value, text):
    assert as_schedule(value).text == text


def test_functions_keep_their_name():
    class Rule:
        def __call__(self, step):
            return step == 3

    def only_seven(step):
        return step == 7

    assert as_schedule(only_seven).text.endswith("only_seven")
    assert as_schedule(Rule()).text == "Rule"
    assert as_schedule(Rule()).due(3)
    assert not as_schedule(only_seven).due(3, 7)
    schedule = every(2)
    assert as_schedule(schedule) is schedule
    assert isinstance(schedule, Schedule)


def test_integers_of_any_type():
    assert every(np.int64(3)).text == "3 steps"
    assert every(np.int64(3)).due(6)
    assert every(np.uint8(2), "epochs").text == "2 epochs"
    assert log_spaced(np.int32(5)).text == "5 per decade"
    assert at(*np.array([10, 1])).text == "at 1 10"
    assert at(np.int64(10)).due(10)
    assert as_schedule(np.int64(3)).text == "3 steps"


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "now", "every epoch", "epoch 3", "3 days", "-1", "1.5", "1e3"),
        *("3steps", "at", "at -1", "at 1,2", "per decade", "x per decade", "0 epochs"),
        *("0", "0 steps", "0 per decade", "3 epochs or so", "1_000", "²"),
    ],
)
def test_texts_that_are_not_understood(text):
    with pytest.raises(ValueError, match=r"expected|at least 1"):
        as_schedule(text)


@pytest.mark.parametrize(
    "make",
    [
        lambda: every(0),
        lambda: every(-2),
        lambda: every(True),
        lambda: every(2, "days"),
        lambda: log_spaced(0),
        lambda: log_spaced(True),
        at,
        lambda: at(1, -1),
        lambda: at(True),
        lambda: as_schedule(0),
        lambda: as_schedule(False),
        lambda: as_schedule(None),
        lambda: as_schedule(2.5),
        lambda: every(1.5),
        lambda: log_spaced(0.5),
        lambda: every(3.0),
        lambda: every("3"),
        lambda: every(None),
        lambda: every(np.float64(3)),
        lambda: log_spaced("5"),
        lambda: at(2.5),
        lambda: at(1, 2.0),
        lambda: at([1, 2]),
        lambda: at("10"),
        lambda: at(None),
        lambda: as_schedule([1, 2]),
        lambda: as_schedule(np.float64(2)),
        lambda: as_schedule(np.int64(0)),
    ],
)
def test_arguments_that_make_no_schedule(make):
    with pytest.raises(ValueError, match=r"expected|at least 1"):
        make()

"""Measurements that fail now and then, or for one reason at several monitors."""

import re

import pytest
from monitored import Plain, fit, same, seeded
from unmeasurable import NoForward, warned

from ntk_callbacks import (
    JacobianMonitor,
    NTKMonitor,
    ParameterDriftMonitor,
    SignalMonitor,
)


def test_what_fails_for_one_reason_is_explained_once():
    def monitors():
        return [NTKMonitor(4, 100), ParameterDriftMonitor(100), SignalMonitor(4, 100)]

    used = monitors()
    for _ in range(2):  # each run tells it anew
        with pytest.warns(UserWarning, match="Monitor") as caught:
            fit(NoForward(), used)
        texts = [
            str(w.message) for w in caught if "the measurement of" in str(w.message)
        ]
        assert len(texts) == 2
        assert "NoForward does not define `forward`" in texts[0]
        assert texts[1] == (
            "SignalMonitor: the measurement of step 0 failed (for the same reason as "
            "NTKMonitor's). The monitor is off for the rest of this run; training goes "
            "on."
        )
    flaky = [NTKMonitor(4, 1, output_fn=Flaky(1)), SignalMonitor(4, 1)]
    flaky[1].instrument.output_fn = Flaky(2)
    with pytest.warns(UserWarning, match="not today") as caught:
        fit(Plain(), flaky, max_steps=3)
    texts = [str(w.message) for w in caught if "the measurement of" in str(w.message)]
    assert [("ArithmeticError: not today" in text) for text in texts] == [True, True]


class Flaky:
    """An `output_fn` that fails at the given updates."""

    def __init__(self, *steps):
        self.steps = steps

    def __call__(self, module, x):
        if module.trainer.global_step in self.steps:
            raise ArithmeticError("not today")
        return module(x)


@pytest.mark.parametrize("kind", [NTKMonitor, JacobianMonitor])
def test_three_failures_in_a_row_turn_a_monitor_off(kind):
    """Mode 20."""
    flaky = Flaky(1, 2, 4, 5, 6)
    run, texts = warned(Plain, lambda: kind(4, 1, output_fn=flaky))
    assert [*run.recorder.measured()] == [0, 3]
    steps = [int(re.search(r"step (\d+)", text)[1]) for text in texts]
    assert steps == [1, 2, 4, 5, 6]
    assert all("ArithmeticError: not today" in text for text in texts)
    assert [("tried as planned" in t, "off for the" in t) for t in texts] == [
        *([(True, False)] * 4),
        (False, True),
    ]


def test_failure_at_the_start_moves_the_reference():
    """The first kernel that could be measured is the reference."""
    run, (text,) = warned(Plain, lambda: NTKMonitor(4, 2, output_fn=Flaky(0)))
    assert "step 0" in text
    measured = run.recorder.measured()
    assert [*measured] == [2, 4, 6, 8]
    assert measured[2]["ntk/relative_change"] == 0.0
    assert measured[4]["ntk/relative_change"] > 0.0


def test_failure_in_between_leaves_references_alone():
    seeded()
    whole = fit(Plain(), [NTKMonitor(4, 2, on_error="raise")]).recorder.measured()
    run, _ = warned(Plain, lambda: NTKMonitor(4, 2, output_fn=Flaky(4)))
    measured = run.recorder.measured()
    assert [*measured] == [0, 2, 6, 8]
    same(measured[2], whole[2])
    same(measured[8], whole[8])
    assert measured[6]["ntk/relative_change"] == whole[6]["ntk/relative_change"]


def test_failure_raises_if_asked_for():
    """`on_error="raise"`: Lightning sees the exception, the module is as it was."""
    model = Plain()
    monitor = NTKMonitor(4, 2, output_fn=Flaky(2), on_error="raise")
    with pytest.raises(ArithmeticError, match="not today"):
        fit(model, [monitor])
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert [step for step, _ in monitor.history] == [0]


def test_interrupts_are_not_swallowed():
    """Only exceptions of measurements are; the keyboard still stops the run."""

    def interrupted(module, x):
        raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(Plain(), [NTKMonitor(4, 1, output_fn=interrupted)])

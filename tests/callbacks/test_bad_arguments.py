"""Arguments of monitors are checked before any training."""

import math
import re

import pytest
import torch
from monitored import Plain, fit

from ntk_callbacks import (
    FeatureMonitor,
    JacobianMonitor,
    LinearizationMonitor,
    LinearizationOptions,
    NTKMonitor,
    NTKOptions,
    ParameterDriftMonitor,
    PredictionMonitor,
    Probe,
    SignalMonitor,
)
from ntk_callbacks.errors import (
    MemoryBudgetError,
    ProbeError,
    ProbeMismatchError,
    UnsupportedModelError,
)


def test_missing_file_is_found_before_any_training(tmp_path):
    with pytest.raises(ProbeError, match=r"there is no file 'nowhere.pt'"):
        NTKMonitor("nowhere.pt")
    with pytest.raises(ProbeError, match="there is no file"):
        JacobianMonitor(tmp_path / "nowhere.pt")


@pytest.mark.parametrize(
    "kind",
    [
        *(NTKMonitor, ParameterDriftMonitor, JacobianMonitor),
        *(PredictionMonitor, SignalMonitor, FeatureMonitor, LinearizationMonitor),
    ],
)
def test_two_monitors_of_one_name_are_refused_before_training(kind):
    name = kind().instrument.name
    way_out = re.escape(f'{kind.__name__}(name="{name}_test")')
    with pytest.raises(ValueError, match=f"writes to the tags {name}/….*{way_out}"):
        fit(Plain(), [kind(every=2), kind(every=3)])
    probe = {} if kind is ParameterDriftMonitor else {"probe": 4}
    other = kind(every=3, name=f"{name}_test", history=False, **probe)
    assert other.kept.target is False
    run = fit(Plain(), [kind(every=2, **probe), other], max_steps=3)
    groups = {tag.split("/")[0] for _, row in run.recorder.rows for tag in row}
    assert {name, f"{name}_test"} <= groups


@pytest.mark.parametrize(
    ("kind", "options"),
    [(NTKMonitor, NTKOptions), (LinearizationMonitor, LinearizationOptions)],
)
def test_keywords_go_before_options_and_leave_the_others_alone(kind, options):
    given = options(mode="train", name="one", history="there")
    monitor = kind(options=given, name="two", history=False)
    assert monitor.instrument.options == options(
        mode="train", name="two", history=False
    )
    assert (kind(options=given).instrument.name, given.name) == ("one", "one")
    with pytest.raises(ValueError, match="name='a b' becomes part of tags"):
        kind(name="a b")


def test_a_monitor_says_what_it_measures_and_when():
    assert repr(NTKMonitor()) == "NTKMonitor(name='ntk', probe=64, every='1 epochs')"
    monitor = JacobianMonitor(Probe(torch.ones(3, 2)), "5 per decade", name="j")
    assert repr(monitor) == "JacobianMonitor(name='j', probe=3, every='5 per decade')"
    text = "ParameterDriftMonitor(name='params', every='2 steps')"
    assert repr(ParameterDriftMonitor(2)) == text


@pytest.mark.parametrize(
    ("make", "error", "what"),
    [
        (lambda: NTKMonitor(metrics=["trase"]), ValueError, "trase.*expected some of"),
        (lambda: NTKMonitor(every="sometimes"), ValueError, "'3 epochs', '100 steps'"),
        (lambda: NTKMonitor(every=0), ValueError, "at least 1"),
        (lambda: NTKMonitor(0), ValueError, "at least 1 example, got 0"),
        (lambda: NTKMonitor(-3), ValueError, "at least 1 example, got -3"),
        (lambda: NTKMonitor(True), ValueError, "probe is a bool"),
        (lambda: JacobianMonitor([1.0, 2.0]), ValueError, "probe is a list"),
        (lambda: NTKMonitor(None), ValueError, "probe is a NoneType"),
        (
            lambda: NTKMonitor(outputs="all"),
            ValueError,
            "outputs='all'.*auto, matrix-free, full",
        ),
        (
            lambda: NTKMonitor(by="layer"),
            ValueError,
            "by='layer'.*'module', 'parameter'",
        ),
        (lambda: NTKOptions(route="fast"), ValueError, "route='fast'.*auto, "),
        (lambda: NTKOptions(mode="test"), ValueError, "mode='test'.*eval, train"),
        (lambda: NTKOptions(memory_budget="2 pounds"), ValueError, "not understood"),
        (lambda: NTKOptions(name="my kernel"), ValueError, "part of tags"),
        (lambda: JacobianMonitor(mode="test"), ValueError, "mode='test'.*eval, train"),
        (lambda: JacobianMonitor(memory_budget=0), ValueError, "must be positive"),
        (lambda: SignalMonitor(layers="["), ValueError, "no regular expression"),
        (lambda: SignalMonitor(activation="tan"), ValueError, "expected one of relu"),
        (lambda: SignalMonitor(gradient_of="x"), ValueError, "expected one of outputs"),
        (lambda: ParameterDriftMonitor(on_error="ignore"), ValueError, "'warn' or"),
        (lambda: NTKMonitor(torch.zeros(0, 3)), ProbeError, "no example"),
        (lambda: NTKMonitor(torch.tensor([[math.nan]])), ProbeError, "inputs hold NaN"),
        (lambda: NTKMonitor(torch.tensor(1.0)), ProbeError, "leading dimension"),
        (
            lambda: Probe(torch.zeros(2, 3), torch.zeros(3)),
            ProbeError,
            "2 inputs but 3 targets",
        ),
    ],
)
def test_arguments_are_checked_before_any_training(make, error, what):
    with pytest.raises(error, match=what):
        make()


def test_pattern_that_takes_nothing_names_what_there_is():
    monitor = NTKMonitor(4, parameters="conv", on_error="raise")
    with pytest.raises(ValueError, match=r"'conv'.*net\.0\.weight"):
        fit(Plain(), [monitor])
    monitor = NTKMonitor(4, by={"conv": "conv"}, on_error="raise")
    with pytest.raises(ValueError, match=r"'conv'.*net\.0\.weight"):
        fit(Plain(), [monitor])


def test_exceptions_are_builtins_too():
    assert issubclass(ProbeError, ValueError)
    assert issubclass(ProbeMismatchError, ValueError)
    assert issubclass(UnsupportedModelError, RuntimeError)
    assert issubclass(MemoryBudgetError, MemoryError)

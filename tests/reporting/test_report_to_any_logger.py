"""Loggers of all kinds, and those that fail: the others get everything."""

import math

import pytest
import torch
from loggers import Drawing, Failing, Recorder, Unreachable, measurement

from ntk_callbacks.reporting.introduction import introduce
from ntk_callbacks.reporting.loggers import report


def test_without_loggers_nothing_happens():
    assert report(measurement(), []) == []


def test_an_experiment_that_does_not_draw_gets_scalars_alone():
    class Table(Recorder):
        experiment = object()

    for logger in (Recorder(), Table()):
        assert report(measurement(), [logger]) == []
        assert [step for step, _ in logger.logged] == [3]
        assert logger.logged[0][1].keys() == {"ntk/trace", "ntk/kernel_velocity"}


def test_an_experiment_that_draws_only_one_kind_is_left_alone():
    class Histograms(Drawing):
        add_image = property()

    logger = Histograms()
    assert report(measurement(), [logger]) == []
    assert logger.logged
    assert not logger.histograms


def test_numbers_arrive_as_they_are():
    scalars = {"a": math.inf, "b": -math.inf, "c": 1e-300, "d": 0.0}
    logger = Recorder()
    assert report(measurement(scalars=scalars), [logger]) == []
    assert logger.logged == [(3, scalars)]


def test_a_logger_may_change_the_numbers_it_is_given():
    class Prefixing(Recorder):
        def log_metrics(self, metrics, step):
            metrics["epoch"] = 0

    taken = measurement()
    last = Recorder()
    report(taken, [Prefixing(), last])
    assert "epoch" not in taken.scalars
    assert "epoch" not in last.logged[0][1]


def test_a_logger_that_raises_is_named_and_the_others_get_everything():
    first, last = Drawing(), Drawing()
    failures = report(measurement(), [first, Failing(), last])
    assert [(name, str(error)) for name, error in failures] == [
        ("Failing", "the server is gone")
    ]
    assert isinstance(failures[0][1], ConnectionError)
    for logger in (first, last):
        assert len(logger.logged) == len(logger.histograms) == len(logger.images) == 1


def test_an_experiment_that_raises_is_named_after_the_scalars_arrived():
    logger = Unreachable()
    ((name, error),) = report(measurement(), [logger])
    assert (name, str(error)) == ("Unreachable", "no connection")
    assert logger.logged


def test_a_picture_that_fails_keeps_no_other_from_a_logger():
    class Picky(Drawing):
        def add_histogram(self, tag, values, step, bins):
            super().add_histogram(tag, values, step, bins)
            if tag == "v":
                raise TypeError("not these values")

    logger = Picky()
    vectors = {tag: torch.tensor([1.0, 2.0]) for tag in ("u", "v", "w")}
    ((name, error),) = report(measurement(vectors=vectors), [logger])
    assert (name, str(error)) == ("Picky", "not these values")
    assert [tag for tag, *_ in logger.histograms] == ["u", "v", "w"]
    assert [tag for tag, *_ in logger.images] == ["ntk/kernel"]


def test_two_loggers_of_one_type_are_told_apart():
    failures = report(measurement(), [Failing(), Recorder(), Failing()])
    assert [name for name, _ in failures] == ["Failing", "Failing (2)"]


def test_an_explanation_is_written_where_the_layout_fails():
    class Broken(Drawing):
        texts = ()

        def add_custom_scalars(self, layout):
            raise OSError("no room")

        def add_text(self, tag, text, step):
            self.texts += (tag,)

    broken, whole = Broken(), Broken()
    whole.add_custom_scalars = lambda layout: None
    tags = ["params/displacement"]
    failures = introduce(tags, "params", ["params"], [Unreachable(), broken, whole])
    assert [(name, str(error)) for name, error in failures] == [
        ("Unreachable", "no connection"),
        ("Broken", "no room"),
    ]
    assert broken.texts == whole.texts == ("params/curves",)


def test_something_that_is_no_logger_is_a_failure_not_a_crash():
    ((name, error),) = report(measurement(), [object()])
    assert name == "object"
    assert isinstance(error, AttributeError)


def test_the_user_can_still_interrupt():
    class Interrupted:
        def log_metrics(self, metrics, step):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report(measurement(), [Interrupted()])

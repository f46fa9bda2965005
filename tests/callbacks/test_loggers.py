"""Every logger gets the same numbers, and may fail without harm to the training."""

import csv
import random
import re

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from monitored import (
    PREFIXES,
    Delicate,
    Plain,
    Recorder,
    fit,
    loader,
    same,
    seeded,
    three_monitors,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from ntk_callbacks import (
    JacobianMonitor,
    NTKMonitor,
    ParameterDriftMonitor,
    PredictionMonitor,
    SignalMonitor,
)


class Refusing(Recorder):
    """A logger whose service is down: it takes losses, nothing else."""

    @property
    def name(self):
        return "refusing"

    def log_metrics(self, metrics, step=None):
        if "loss" not in metrics:
            raise ConnectionError("the service is down")
        super().log_metrics(metrics, step)


def test_without_a_logger():
    """Mode 12: nothing to write to; measurements are still taken."""
    monitors = three_monitors(3)
    fit(Plain(), monitors, logger=False)
    for monitor in monitors:
        assert [step for step, _ in monitor.history] == [0, 3, 6, 8]


def test_tensorboard(tmp_path):
    """Modes 12 and 37: scalars, a histogram, an image; no run folders of their own."""
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    monitors = three_monitors(3)
    fit(Plain(), monitors, logger=logger)
    events = [path for path in tmp_path.rglob("*") if "tfevents" in path.name]
    assert len(events) == 1
    read = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0})
    read.Reload()
    tags = read.Tags()
    found = {
        (event.step, tag): event.value
        for tag in tags["scalars"]
        for event in read.Scalars(tag)
        if tag.split("/")[0]
        in ("ntk", "params", "params_tensors", "jacobian", "monitor")
        and not tag.startswith("monitor/seconds")
    }
    for monitor in monitors:
        for step, row in monitor.history:
            for tag, value in row.items():
                logged = found.pop((step, tag))
                assert logged == pytest.approx(value, rel=1e-6, nan_ok=True)
    assert not found
    drawn = {"ntk/eigenvalues_log10", "jacobian/singular_values_log10"}
    assert {*tags["histograms"]} == drawn
    assert {*tags["images"]} == {
        "ntk/kernel",
        "ntk/eigenvalues_log10_over_time",
        "jacobian/singular_values_log10_over_time",
    }
    assert [event.step for event in read.Images("ntk/kernel")] == [0, 3, 6, 8]


def test_csv(tmp_path):
    """Mode 12: a writer without images; all columns from the first measurement on."""
    logger = CSVLogger(tmp_path)
    fit(Plain(), three_monitors(3), logger=logger)
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open() as file:
        rows = [*csv.DictReader(file)]
    for tag in ("ntk/trace", "params/displacement", "jacobian/mean_square"):
        assert [int(row["step"]) for row in rows if row[tag]] == [0, 3, 6, 8]


def test_several_loggers(tmp_path):
    first, last = Recorder(), Recorder()
    loggers = [first, CSVLogger(tmp_path), TensorBoardLogger(tmp_path), last]
    fit(Plain(), three_monitors(3), logger=loggers)
    assert [*first.measured()] == [0, 3, 6, 8]
    same(first.rows, last.rows)


def test_logger_that_raises():
    """The others get everything, the user is told once, training is the same."""
    refusing, after = Refusing(), Recorder()
    monitor = NTKMonitor(4, 3)
    seeded()
    with pytest.warns(UserWarning, match="the service is down") as caught:
        run = fit(Plain(), [monitor], logger=[refusing, after])
    texts = [str(w.message) for w in caught if "service is down" in str(w.message)]
    assert len(texts) == 1
    assert "Refusing did not take the measurement of step 0" in texts[0]
    assert "Other loggers got it" in texts[0]
    assert [*after.measured()] == [step for step, _ in monitor.history] == [0, 3, 6, 8]
    assert not refusing.measured()
    seeded()
    same(run.model.state_dict(), fit(Plain()).model.state_dict())


def test_logger_that_draws_random_numbers(tmp_path):
    """As those that wait a random time before they try again."""

    class Retrying(Recorder):
        @property
        def experiment(self):
            return self

        def log_metrics(self, metrics, step):
            if any(tag.startswith(PREFIXES) for tag in metrics):
                self.wait()
            super().log_metrics(metrics, step)

        def wait(self, *_, **__):
            random.random()
            np.random.rand()  # noqa: NPY002
            torch.rand(3)

        add_histogram = add_image = add_text = add_custom_scalars = wait

    seeded()
    logger = Retrying()
    monitors = [NTKMonitor(4, 2, on_error="raise", history=str(tmp_path))]
    run = fit(Delicate(), monitors, logger=logger, val=loader(3))
    assert [*logger.measured()] == [0, 2, 4, 6, 8]
    seeded()
    bare = fit(Delicate(), val=loader(3))
    same(run.model.state_dict(), bare.model.state_dict())
    same(run.generators, bare.generators)


def test_logger_that_raises_is_an_error_if_asked_for():
    monitor = ParameterDriftMonitor(3, on_error="raise")
    with pytest.raises(ConnectionError, match="the service is down"):
        fit(Plain(), [monitor], logger=[Refusing()])


def test_tags_are_legal_for_every_logger():
    """Mode 37: MLflow strips other characters; TensorBoard groups by the first part."""

    class Odd(nn.ModuleDict):
        def forward(self, x):
            return self["a b:c"](x)

    model = Plain(nn.Sequential(Odd({"a b:c": nn.Linear(3, 2)})))
    monitors = [
        NTKMonitor(4, 3, by="parameter", on_error="raise"),
        ParameterDriftMonitor(3, on_error="raise"),
        JacobianMonitor(4, 3, on_error="raise"),
        PredictionMonitor(4, 3, per_class=True, on_error="raise"),
        SignalMonitor(4, 3, per_layer=True, on_error="raise"),
    ]
    measured = fit(model, monitors).recorder.measured()
    tags = {tag for row in measured.values() for tag in row}
    assert "ntk_modules/trace/net.0.a_b_c.weight" in tags
    assert "params_tensors/displacement/net.0.a_b_c.bias" in tags
    assert all(re.fullmatch(r"[A-Za-z0-9_/.-]+", tag) for tag in tags)
    groups = {tag.split("/")[0] for tag in tags}
    assert groups == {
        *("ntk", "ntk_modules", "params", "params_tensors", "jacobian"),
        *("prediction", "prediction_classes", "signal", "signal_layers"),
    }

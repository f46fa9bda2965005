"""What is foretold of a step, from made-up changes and from three real updates."""

import logging

import pytest
import torch
from torch import nn

from ntk_callbacks.callbacks.parameters import ParameterDriftMonitor
from ntk_callbacks.experiments.data import Digits
from ntk_callbacks.experiments.module import Classifier
from ntk_callbacks.studies.live import live_curves
from ntk_callbacks.studies.loss_prediction import LossPrediction


def test_findings_are_those_of_the_smallest_rate():
    study = LossPrediction({"sgd": [0.1, 0.01], "adam": [0.2]}, seeds=2)
    made_up = {}
    for name, job in study.jobs().items():
        small, adam = job["rate"] == 0.01, job["optimizer"] == "adam"
        made_up[name] = {
            **job,
            "by_actual": [-2.0, 2.0],
            "by_optimizer": [-2.0, 1.6] if small else [2.0, 2.0],
            "by_gradient_flow": [-0.25, 0.25] if adam else [-1.0, 2.0],
            "step_error": 0.5 * adam,
        }
    found = study.findings(made_up)
    assert [(row["optimizer"], row["rate"]) for row in found.table] == [
        *(("sgd", 0.01), ("sgd", 0.1), ("adam", 0.2))
    ]
    assert found.numbers["sgd_explained"] == pytest.approx(0.9)
    assert found.numbers["sgd_by_gradient_flow"] == pytest.approx(0.75)
    assert found.numbers["sgd_times_gradient_flow"] == pytest.approx(6 / 5)
    assert found.numbers["adam_explained"] == pytest.approx(0.0)
    assert found.numbers["adam_times_gradient_flow"] == pytest.approx(8.0)
    assert found.numbers["step_error"] == 0.5


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_three_updates(optimizer):
    rate = 1e-4
    sizes = {"width": 8, "depth": 1, "steps": 3, "batch": 32, "probe": 20}
    torch.manual_seed(0)
    found = LossPrediction.run(
        optimizer=optimizer, rate=rate, seed=0, device="cpu", **sizes
    )
    flow, own = found["by_gradient_flow"], found["by_optimizer"]
    assert len(flow) == 3
    assert own == pytest.approx(found["by_actual"], rel=0.05, abs=1e-6)
    if optimizer == "adam":
        assert own[0] < 1.5 * flow[0] < 0
    else:  # the first step of momentum is that of descent
        assert own[0] == pytest.approx(flow[0], rel=1e-4)
    if optimizer == "momentum":
        assert own[2] < 1.5 * flow[2] < 0


def test_a_live_run_is_silent_and_leaves_logging_as_it_was(caplog):
    monitor = ParameterDriftMonitor(every=1)
    module = Classifier(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), lambda p: torch.optim.SGD(p, 1)
    )
    with caplog.at_level(logging.INFO):
        curves = live_curves(module, Digits(64), [monitor], steps=2, device="cpu")
        assert not caplog.records
        logging.getLogger("after").info("heard")
    assert [record.message for record in caplog.records] == ["heard"]
    assert curves["params/displacement"].steps.tolist() == [0, 1, 2]

"""A measurement reaches the loggers there are: as much of it as each can take."""

import math

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from loggers import Drawing, Recorder, events_of, measurement

from ntk_callbacks.record import Measurement
from ntk_callbacks.reporting.loggers import report

# Loggers as they are.


def test_tensorboard_gets_scalars_histograms_and_images_at_their_step(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    for step in (0, 7, 5):
        assert report(measurement(step), [logger]) == []
    events = events_of(logger)
    tags = events.Tags()
    assert set(tags["scalars"]) == {"ntk/trace", "ntk/kernel_velocity"}
    assert tags["histograms"] == ["ntk/eigenvalues_log10"]
    assert tags["images"] == ["ntk/kernel"]
    trace = [(event.step, event.value) for event in events.Scalars("ntk/trace")]
    assert trace == [(0, 2.5), (7, 2.5), (5, 2.5)]
    assert all(
        math.isnan(event.value) for event in events.Scalars("ntk/kernel_velocity")
    )
    assert [e.step for e in events.Histograms("ntk/eigenvalues_log10")] == [0, 7, 5]
    assert [(e.step, e.width, e.height) for e in events.Images("ntk/kernel")] == [
        (step, 256, 256) for step in (0, 7, 5)
    ]


@pytest.mark.parametrize(
    "vector",
    [
        pytest.param(torch.linspace(-3, 4, 50), id="spread"),
        pytest.param(torch.tensor([2.0]), id="single"),
        pytest.param(torch.zeros(5), id="zeros"),
        pytest.param(torch.full((5,), -1e-300, dtype=torch.float64), id="almost zero"),
        pytest.param(1 + torch.tensor([0.0, 2**-52]).double(), id="neighbors"),
        pytest.param(torch.tensor([0.5, 2.0]).bfloat16(), id="bfloat16"),
        pytest.param(torch.tensor([1, 2, 3]), id="integers"),
        pytest.param(torch.tensor([-1.0, 1.0], requires_grad=True), id="gradient"),
    ],
)
def test_histogram_counts_every_value_between_smallest_and_largest(tmp_path, vector):
    logger = TensorBoardLogger(tmp_path)
    assert report(measurement(vectors={"v": vector}), [logger]) == []
    (event,) = events_of(logger).Histograms("v")
    histogram = event.histogram_value
    assert histogram.num == len(vector)
    assert sum(histogram.bucket) == len(vector)
    assert histogram.min == vector.min().item()
    assert histogram.max == vector.max().item()


def bins_for(vector):
    logger = Drawing()
    report(measurement(vectors={"v": vector}), [logger])
    ((_, _, _, bins),) = logger.histograms
    return bins


def test_bins_of_a_histogram_are_equally_wide_and_span_the_values():
    bins = bins_for(torch.tensor([-3.0, 0.0, 0.01, 4.0]))
    assert np.diff(bins) == pytest.approx(7 / (len(bins) - 1), rel=1e-4)
    assert (bins[0], bins[-1]) == pytest.approx((-3, 4), abs=1e-4)
    assert bins[0] < -3
    assert bins[-1] > 4


@pytest.mark.parametrize("value", [0.0, -2.5, 1e-12])
def test_bins_have_a_width_where_all_values_are_equal(value):
    assert (np.diff(bins_for(torch.full((5,), value))) > 0).all()


def test_csv_gets_the_scalars(tmp_path):
    logger = CSVLogger(tmp_path)
    assert report(measurement(0), [logger]) == []
    assert report(measurement(9), [logger]) == []
    logger.save()
    table = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
    header, *rows = table.splitlines()
    named = [dict(zip(header.split(","), row.split(","), strict=True)) for row in rows]
    assert named == [
        {"step": step, "ntk/trace": "2.5", "ntk/kernel_velocity": "nan"}
        for step in ("0", "9")
    ]


def test_dummy_logger_takes_everything():
    assert report(measurement(), [DummyLogger()]) == []


# Measurements of all kinds.


@pytest.mark.parametrize("kind", [Recorder, Drawing])
def test_a_measurement_without_anything_is_taken(kind):
    logger = kind()
    assert report(Measurement(4), [logger]) == []
    assert logger.logged == [(4, {})]


def test_an_empty_measurement_leaves_no_trace_in_files(tmp_path):
    loggers = [TensorBoardLogger(tmp_path / "t"), CSVLogger(tmp_path / "c")]
    assert report(Measurement(4), loggers) == []
    tags = events_of(loggers[0]).Tags()
    assert tags["histograms"] == tags["images"] == []
    assert not [tag for tag in tags["scalars"] if "/" in tag]


def test_values_that_are_not_finite_are_left_out_of_a_histogram():
    logger = Drawing()
    vector = torch.tensor([math.nan, 1.0, math.inf, 2.0, -math.inf])
    report(measurement(vectors={"v": vector}), [logger])
    ((tag, values, step, _),) = logger.histograms
    assert (tag, values.tolist(), step) == ("v", [1.0, 2.0], 3)


@pytest.mark.parametrize(
    "vector", [torch.zeros(0), torch.full((3,), math.nan), torch.tensor([math.inf])]
)
def test_a_spectrum_without_finite_values_is_not_drawn(tmp_path, vector):
    logger = TensorBoardLogger(tmp_path)
    assert report(measurement(vectors={"v": vector}), [logger]) == []
    tags = events_of(logger).Tags()
    assert tags["histograms"] == []
    assert tags["images"] == ["ntk/kernel"]


def test_a_kernel_with_some_gaps_is_drawn_and_one_without_numbers_is_not(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    matrices = {
        "some": torch.tensor([[1.0, math.nan], [0.0, 1.0]]),
        "none": torch.full((2, 2), math.nan),
        "empty": torch.zeros(0, 0),
    }
    assert report(measurement(matrices=matrices), [logger]) == []
    assert events_of(logger).Tags()["images"] == ["some"]


def test_the_tensors_themselves_stay_as_they_are():
    vector = torch.tensor([math.nan, 1.0])
    matrix = torch.tensor([[math.inf, 1.0]])
    report(measurement(vectors={"v": vector}, matrices={"m": matrix}), [Drawing()])
    assert vector[1] == 1
    assert vector[0].isnan()
    assert matrix.tolist() == [[math.inf, 1.0]]

"""A measurement reaches every logger: as much of it as that logger can take."""

import math

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ntk_callbacks.record import Measurement
from ntk_callbacks.reporting.introduction import introduce
from ntk_callbacks.reporting.loggers import report


class Recorder:
    """A logger for scalars alone."""

    def __init__(self):
        self.logged = []

    def log_metrics(self, metrics, step):
        self.logged.append((step, metrics))


class Drawing(Recorder):
    """A logger whose experiment writes down how it is called."""

    def __init__(self):
        super().__init__()
        self.histograms = []
        self.images = []

    @property
    def experiment(self):
        return self

    def add_histogram(self, tag, values, step, bins):
        self.histograms.append((tag, values, step, bins))

    def add_image(self, tag, image, step):
        self.images.append((tag, image, step))


class Failing:
    def log_metrics(self, metrics, step):
        raise ConnectionError("the server is gone")


class Unreachable(Recorder):
    @property
    def experiment(self):
        raise RuntimeError("no connection")


def measurement(step=3, **changes):
    parts = {
        "scalars": {"ntk/trace": 2.5, "ntk/kernel_velocity": math.nan},
        "vectors": {"ntk/eigenvalues_log10": torch.tensor([-1.0, 0.0, 0.5, 2.0])},
        "matrices": {"ntk/kernel": torch.tensor([[2.0, 1.0], [1.0, 3.0]])},
    }
    return Measurement(step, **{**parts, **changes})


def events_of(logger):
    logger.finalize("success")
    return EventAccumulator(
        logger.log_dir, size_guidance={"scalars": 0, "histograms": 0, "images": 0}
    ).Reload()


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


# Loggers of all kinds.


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

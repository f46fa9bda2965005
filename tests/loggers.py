"""Loggers that draw, record and fail, and a measurement for them."""

import math

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ntk_callbacks.record import Measurement


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

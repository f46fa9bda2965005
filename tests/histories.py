"""Histories as a monitor writes them, and a check of what is read back."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ntk_callbacks.record import Measurement
from ntk_callbacks.reporting.history_file import FOLDER, HistoryFile

RESUMED_MID_EPOCH = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended"),
]


def measurement(step):
    return Measurement(
        step,
        {"ntk/trace": step / 3, "ntk/velocity": math.nan},
        {"ntk/eigenvalues": torch.arange(step % 3 + 1).double() + step},
        {"ntk/kernel": torch.eye(2) * step},
    )


def written(steps, folder="run", **settings):
    file = HistoryFile(Path(folder, FOLDER), "ntk", **settings)
    after = -1
    for step in steps:
        file.append(measurement(step), after)
        after = step
    return Path(folder)


def check(history, steps):
    """Every number is the one that was measured, to the last bit."""
    assert history["ntk/trace"].steps.tolist() == [*steps]
    assert history["ntk/trace"].values.tolist() == [step / 3 for step in steps]
    assert np.isnan(history["ntk/velocity"].values).all()
    spectra = history["ntk/eigenvalues"]
    assert spectra.steps.tolist() == [*steps]
    for step, values in zip(steps, spectra.values, strict=True):
        assert values.dtype == np.float64
        assert values.tolist() == measurement(step).vectors["ntk/eigenvalues"].tolist()

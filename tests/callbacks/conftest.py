"""Every run writes into its own folder and starts from the same seeds."""

import random

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def fresh_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 the global generator is what must not move

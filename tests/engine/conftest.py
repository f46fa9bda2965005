"""The small network of most tests, its inputs, and a ban on exact routes."""

import pytest
import torch
from networks import mlp

from ntk_callbacks.engine import execution, kernel


@pytest.fixture
def net():
    return mlp().double()


@pytest.fixture
def x():
    return torch.randn(4, 5, dtype=torch.float64)


@pytest.fixture
def fast_only(monkeypatch):
    """No exact route helps out where a fast one should do."""

    def refused(problem):
        raise AssertionError(f"an exact route was taken for {list(problem.groups)}")

    monkeypatch.setattr(execution, "fallback", refused)
    monkeypatch.setattr(kernel, "fallback", refused)

"""Every test draws the same random numbers, whichever tests ran before it."""

import pytest
import torch

# The tensors here are small: more threads make them slower.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)

"""A module that holds one of everything, and its bits."""

from collections import deque

import pytest
import torch
from torch import nn


class Odd(nn.Module):
    """Holds one of everything a module can hold."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.head = nn.Linear(4, 4, bias=False)
        self.tied = self.head.weight
        self.register_buffer("seen", torch.zeros(2), persistent=False)
        self.plain = torch.ones(3)
        self.calls = 0
        self.cache = {"a": 1}
        self.history = [1, 2]
        self.tags = {"x"}
        self.recent = deque([1, 2], maxlen=3)
        self.frozen_bias = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, x):
        self.calls += 1
        return self.head(self.body(x))


@pytest.fixture
def model():
    return Odd().train()


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_bits(model, before):
    assert model.state_dict().keys() == before.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        assert tensor.dtype == before[name].dtype, name

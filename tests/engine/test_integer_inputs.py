"""Inputs that are no floating point numbers: tables, flags and masks."""

import pytest
import torch
from cases import BY_ID
from networks import Computed, sequences, tokens
from recordings import check_kernel, names, recorded
from torch import nn

from ntk_callbacks import plan_ntk
from ntk_callbacks.engine.recording import gradients_at


def test_a_table_in_front_of_everything():
    """Nothing before the first tap has a gradient; its output has one all the same."""
    model, x = BY_ID["embedding"].build()
    recording = recorded(model, x)
    assert names(recording) == ["embedding", "linear"]
    gradients = gradients_at(recording.taps, recording.outputs.sum())
    assert all(gradient.any() for gradient in gradients)
    assert recording.taps[0].args[0].dtype == torch.long
    assert plan_ntk(model, x).coverage == 1.0
    check_kernel(model, x)


def test_ids_that_no_two_examples_share():
    model = nn.Sequential(nn.Embedding(20, 5), nn.Flatten(), nn.Linear(20, 2)).double()
    x = torch.arange(12).view(3, 4)
    assert plan_ntk(model, x).coverage == 1.0
    check_kernel(model, x)


@pytest.mark.parametrize("ids", [[[0, 1], [1, 2]], [[3, 3], [3, 3]]])
def test_a_table_that_is_indexed(ids):
    model = Computed(
        lambda self, ids: self.head(torch.tanh(self.table[ids]).flatten(1)),
        table=nn.Parameter(torch.randn(4, 5)),
        head=nn.Linear(10, 2),
    ).double()
    x = torch.tensor(ids) - 4  # counted from the end
    assert plan_ntk(model, x).coverage == 1.0
    check_kernel(model, x)


def test_flags_and_masks_beside_the_data():
    def compute(self, x, mask, scale):
        h = torch.tanh(self.stem(x)).masked_fill(mask[:, :, None], 0.0)
        return self.head(h.sum(1)) * (self.gain * scale[:, None])

    model = Computed(
        compute,
        stem=nn.Linear(6, 6),
        head=nn.Linear(6, 2),
        gain=nn.Parameter(torch.randn(2)),
    ).double()
    x = sequences().double(), tokens() > 3, torch.tensor([1, 2, 3])
    assert plan_ntk(model, x).coverage == 1.0
    check_kernel(model, x)

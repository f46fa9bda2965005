"""Cells of given scales, their stretch, and what is read off the networks."""

import math

import pytest
import torch
from torch import nn

from ntk_callbacks.studies import Gating
from ntk_callbacks.studies.gating import _sequences
from ntk_callbacks.studies.recurrent_cells import (
    CELLS,
    MinimalCell,
    Remembering,
    draw_,
    measured_stretch,
    stretch,
)
from ntk_callbacks.theory import Gate

STUDY = Gating([3, 9], [0.1, 0.01])
CENTER = {"vanilla": 0.9197747, "minimal": 0.5717859, "gru": 1.3087, "lstm": 1.1622124}


def made_up(job):
    if job["part"] == "wide":
        wrong = {"gru": 1.05}.get(job["kind"], 1.001)
        return {"stretch": CENTER[job["kind"]] * (wrong + 0.01 * (job["seed"] - 0.5))}
    if job["part"] == "start":
        return {"times": [1], "mean_square": [1.0], "largest_square": [2.0]}
    right = job["length"] == 3 or job["kind"] != "vanilla"
    lost = 0.1 if job["kind"] == "minimal" else 0.0
    accuracy = 1.0 - lost if right and job["rate"] == 0.01 else 0.25
    return {"accuracy": accuracy, "updates_taken": 3}


def test_numbers_of_known_results():
    results = {name: {**job, **made_up(job)} for name, job in STUDY.jobs().items()}
    numbers = STUDY.findings(results).numbers
    assert numbers["vanilla_error"] == pytest.approx(0.001, rel=0.01)
    assert numbers["worst_stretch_error"] == pytest.approx(0.05, rel=0.01)
    assert numbers["vanilla_short_accuracy"] == 1.0
    assert numbers["vanilla_long_accuracy"] == 0.25
    assert numbers["gated_long_accuracy"] == 0.9  # of the worst of three


@pytest.mark.parametrize("kind", CELLS)
def test_products_have_the_mean_square_of_the_whole_jacobian(kind):
    """A gate without recurrent weights has a Jacobian that is known by hand."""
    still, bias = Gate(0.0), 2.0
    count = {"gru": 3, "lstm": 4}.get(kind, 1)
    gates = [Gate(0.0, mean=bias) if kind == "minimal" else still] * count
    expected = {
        "vanilla": 0.0,
        "minimal": (1 / (1 + math.exp(-bias))) ** 2,
        "gru": 0.25,
        # Of (h, c): ∂c'/∂c = ½, ∂h'/∂c = ½ · ½ where the cell is 0.
        "lstm": (0.25 + 0.0625) / 2,
    }[kind]
    found = measured_stretch(
        kind,
        gates,
        width=6,
        examples=1000,
        skip=0,
        steps=5,
        input_square=1.0,
        device="cpu",
    )
    # Exact but for the LSTM, whose h' and c' share their column of J.
    assert found == pytest.approx(expected, abs=0.003 if kind == "lstm" else 1e-6)


@pytest.mark.parametrize("kind", ["vanilla", "minimal", "gru"])
def test_stretch_of_a_cell_is_that_of_theory(kind):
    torch.manual_seed(0)
    gates = [Gate(1.3, 0.5)] * (3 if kind == "gru" else 1)
    found = measured_stretch(
        kind,
        gates,
        width=300,
        examples=32,
        skip=10,
        steps=20,
        input_square=1.0,
        device="cpu",
    )
    assert found == pytest.approx(stretch(kind, gates, 1.0), rel=0.04)


@torch.no_grad()
def test_weights_have_the_scales_of_their_gates():
    torch.manual_seed(0)
    cell = nn.GRUCell(200, 100)
    draw_(cell, [Gate(1.0, 0.5), Gate(2.0, 1.0, 0.0, 3.0), Gate(0.0, 0.0, 1.0)])
    assert cell.weight_hh[:100].var() * 100 == pytest.approx(1.0, rel=0.05)
    assert cell.weight_ih[:100].var() * 200 == pytest.approx(0.25, rel=0.05)
    assert cell.weight_hh[100:200].var() * 100 == pytest.approx(4.0, rel=0.05)
    assert (cell.bias_ih[100:200] == 3).all()
    assert cell.weight_hh[200:].count_nonzero() == 0
    assert cell.bias_ih[200:].std() == pytest.approx(1.0, rel=0.2)


def test_minimal_cell_by_hand():
    cell = MinimalCell(1, 1)
    for parameter, value in zip(cell.parameters(), (2.0, 3.0, 0.5, 0.0), strict=True):
        nn.init.constant_(parameter, value)
    u = 1 / (1 + math.exp(-(2.0 * 0.1 + 3.0 * 0.4 + 0.5)))
    found = cell(torch.tensor([[0.1]]), torch.tensor([[0.4]])).item()
    assert found == pytest.approx(u * 0.4 + (1 - u) * 0.1)


def test_only_the_first_input_tells_the_class():
    torch.manual_seed(0)
    x, labels = _sequences(20, 7, "cpu")
    assert x[:, 0].argmax(1).equal(labels)
    assert x[:, 1:, :-1].count_nonzero() == 0
    assert x[:, 0, -1].count_nonzero() == 0
    assert x[:, 1:, -1].std() > 0.7


@pytest.mark.parametrize("kind", CELLS)
def test_networks_map_sequences_to_logits(kind):
    gates = [Gate(1.0, 0.3)] * {"gru": 3, "lstm": 4}.get(kind, 1)
    assert Remembering(kind, gates, 5, 8, 4)(torch.randn(3, 6, 5)).shape == (3, 4)

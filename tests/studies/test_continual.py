"""What is exact of forgetting: linear networks, right angles, ranks without ties."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from ntk_callbacks.studies.continual import (
    Continual,
    kernel_cosines,
    mean_loss,
    rank_correlation,
    turned,
)

SIZES = {"angles": [0, 30, 90], "width": 8, "examples": 20, "steps": 20}


def test_forgetting_of_a_linear_model_is_foretold_exactly():
    torch.manual_seed(0)
    result = Continual.run(seed=0, depth=0, device="cpu", **SIZES)
    assert len(result["pairs"]) == 3
    for pair in result["pairs"]:
        assert pair["output_error"] < 1e-9
        assert pair["foretold"] == pytest.approx(pair["measured"], abs=1e-9)
        assert abs(pair["measured"]) > 1e-6


def test_a_bent_network_is_not_foretold_exactly():
    torch.manual_seed(0)
    result = Continual.run(seed=0, depth=1, device="cpu", **SIZES)
    assert all(pair["output_error"] > 1e-4 for pair in result["pairs"])


@pytest.mark.parametrize("quarters", [0, 1, 2, 3, 4])
def test_images_turned_by_right_angles(quarters):
    images = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    expected = torch.rot90(images, quarters, (2, 3))
    torch.testing.assert_close(turned(images, 90.0 * quarters), expected)


def test_kernels_between_tasks_by_hand():
    # Of a linear map without bias the kernel is X Xᵀ ⊗ 1, and √c cancels.
    a, b = torch.randn(4, 3).double(), torch.randn(5, 3).double()
    net = nn.Linear(3, 2, bias=False).double()
    norms = [(p @ q.T).norm() for p, q in ((a, b), (a, a), (b, b))]
    expected = float(norms[0] / (norms[1] * norms[2]).sqrt())
    table = np.array(kernel_cosines(net, [a, b]))
    assert table == pytest.approx(np.array([[1, expected], [expected, 1]]))


def test_rank_correlation_is_spearmans():
    chance = np.random.default_rng(0)
    first, second = chance.normal(size=12), chance.normal(size=12)
    expected = spearmanr(first, second).statistic
    found = rank_correlation(list(first), list(second + first))
    assert found == pytest.approx(spearmanr(first, second + first).statistic)
    assert rank_correlation(list(first), list(second)) == pytest.approx(expected)


def test_findings_gather_pairs_by_their_angle():
    pair = {"measured": 0.5, "output_error": 0.2}
    made_up = {
        "a": {"pairs": [{"old": 350, "new": 20, "foretold": 0.4, **pair}]},
        "b": {
            "pairs": [
                {"old": 0, "new": 30, "foretold": 0.6, **pair, "measured": 0.7},
                {"old": 90, "new": 0, "foretold": -0.1, **pair, "measured": 0.6},
            ]
        },
    }
    found = Continual([0]).findings(made_up)
    assert [row["angle_between"] for row in found.table] == [30, 90]
    assert found.table[0]["pairs"] == 2
    assert found.table[0]["foretold"] == pytest.approx(0.5)
    assert found.numbers["rank_correlation"] == pytest.approx(0.5)
    assert found.numbers["output_error"] == pytest.approx(0.2)


def test_mean_loss():
    assert mean_loss(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.zeros(2, 2)) == 1.5

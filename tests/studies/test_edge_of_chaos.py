"""Greatest depths from made-up accuracies, against the answer on paper."""

import math

import pytest
from matplotlib.figure import Figure

from ntk_callbacks import theory
from ntk_callbacks.studies.edge_of_chaos import EdgeOfChaos, greatest_depth

SIGMA_WS = [1.0, 1.2, 1.4, 1.6, 1.8]
DEPTHS = [4, 8, 16, 32, 64, 128, 256, 512]


def study(**changes):
    return EdgeOfChaos(SIGMA_WS, DEPTHS, [0.1], **changes)


def results(deepest):
    """Every depth up to the given one is trained, and the next is not."""
    found = {}
    for sigma_w, depth in zip(SIGMA_WS, deepest, strict=True):
        reached = [1.0 if d <= depth else 0.5 for d in DEPTHS if d <= 2 * depth]
        found[f"sigma_w={sigma_w}"] = {"sigma_w": sigma_w, "reached": reached}
    return found


@pytest.mark.parametrize(
    ("reached", "expected"),
    [
        ([0.2], 4),  # nothing is trained
        ([0.9, 0.89], math.sqrt(4 * 8)),
        ([1.0, 1.0, 0.1], math.sqrt(8 * 16)),
        ([1.0] * 8, 512),  # everything is
    ],
)
def test_greatest_depth(reached, expected):
    assert greatest_depth(reached, DEPTHS, 0.9) == pytest.approx(expected)


def scale(sigma_w):
    """ξ_c with σ_b² = 0.05, of maps that have tests of their own."""
    return float(theory.mean_field("tanh", sigma_w, 0.05**0.5).xi_c)


def test_depths_that_are_a_multiple_of_the_scale():
    scales = {s: scale(s) for s in SIGMA_WS}
    assert [s for s in SIGMA_WS if scales[s] <= 12] == [1.0, 1.6, 1.8]
    numbers = study().findings(results([16, 64, 256, 64, 32])).numbers
    # The last trained depth times √2; ξ_c is at most 12 for three σ_w.
    multiples = [16 * 2**0.5 / scales[1.0]]
    multiples += [64 * 2**0.5 / scales[1.6], 32 * 2**0.5 / scales[1.8]]
    mean = math.prod(multiples) ** (1 / 3)
    assert numbers["depth_over_scale"] == pytest.approx(mean)
    worst = max(max(m / mean, mean / m) for m in multiples)
    assert numbers["worst_factor"] == pytest.approx(worst)
    assert numbers["correlation"] > 0.9
    # The edge of chaos is at 1.327, the deepest network at 1.4, cells are 0.2 wide.
    assert numbers["cells_from_edge"] == pytest.approx((1.4 - 1.327) / 0.2, abs=2e-3)


def test_depths_that_have_nothing_to_do_with_it():
    numbers = study(largest_scale=20.0).findings(results([64, 16, 8, 8, 8])).numbers
    assert numbers["correlation"] < 0.5
    assert numbers["worst_factor"] > 2
    assert numbers["cells_from_edge"] == pytest.approx(1.635, abs=1e-2)


def test_tied_cells_count_by_their_middle():
    numbers = study().findings(results([16, 64, 64, 64, 16])).numbers
    assert numbers["best_sigma_w"] == pytest.approx(1.4)


def test_columns_of_several_heights_are_drawn():
    figure = Figure()
    study().draw(results([16, 64, 256, 512, 4]), figure)
    assert len(figure.axes) == 3  # two panels and the scale of the colors

"""What `isometry` finds in made-up spectra and losses, and its one backward pass."""

import pytest
import torch

from ntk_callbacks.studies.critical_networks import isometry_gap, spectrum, training
from ntk_callbacks.studies.isometry import Isometry

STUDY = Isometry(
    depths=[1, 4],
    learning_rates=[0.1, 1.0],
    linear_edge_depth=4,
    seeds=2,
    trained_seeds=2,
    steps=50,
)
# Var s² of one layer, by hand: μ₂/μ₁² − 1 of the activation, 1 more for Gaussian
# weights; of the smooth ones from an independent implementation.
SPREAD = {"linear": 0.0, "relu": 1.0, "tanh": 0.15254, "hard_tanh": 0.165545}


def made_up(variance=1.0, mean=1.0, edge=1.0):
    """What networks of infinite width would give, off by factors."""
    results = {}
    for name, job in STUDY.jobs().items():
        found = {"gap": 1e-15}
        if job["part"] == "training":
            slow = 3 if "gaussian" in name else 1
            found = {"losses": [[2.0] * 51, [2.0] * 10 * slow + [0.4]]}
        if job["part"] == "spectrum":
            more = job["weights"] == "gaussian"
            kind = (job["activation"], job["weights"])
            largest = {
                ("linear", "gaussian"): 5**5 / 4**4,
                ("relu", "orthogonal"): 256 / 27,
            }.get(kind, 1.0)
            spread = SPREAD[job["activation"]] + more
            found = {
                "squares": [1.0],
                "by_depth": [
                    {
                        "mean": mean,
                        "spread": variance * depth * spread,
                        "largest": edge * mean * largest,
                    }
                    for depth in STUDY.depths
                ],
            }
        results[name] = job | found
    return results


def test_spectra_of_infinite_width_have_no_error():
    numbers = STUDY.findings(made_up(mean=1.3)).numbers
    assert numbers["variance_worst_error"] < 1e-5
    assert numbers["linear_edge"] == pytest.approx(1)
    assert numbers["relu_edge"] == pytest.approx(1)
    assert numbers["least_speedup"] == numbers["mean_speedup"] == 3


def test_errors_are_those_of_the_spectra():
    numbers = STUDY.findings(made_up(variance=0.7, edge=0.8)).numbers
    assert numbers["variance_worst_error"] == pytest.approx(0.3, abs=1e-5)
    assert numbers["linear_edge"] == pytest.approx(0.8)
    assert numbers["relu_edge"] == pytest.approx(0.8)


def test_a_network_that_never_learns_counts_with_all_its_updates():
    results = made_up()
    results["training,gaussian,seed=1"]["losses"] = [[2.0] * 51, [2.0, 500.0]]
    numbers = STUDY.findings(results).numbers
    assert numbers["least_speedup"] == 3
    assert numbers["mean_speedup"] == (3 + 5) / 2


def test_spectrum_by_one_backward_pass_is_that_of_the_engine():
    torch.manual_seed(0)
    found = spectrum(
        activation="tanh",
        weights="gaussian",
        depths=[2, 3],
        width=12,
        compare=True,
        device="cpu",
    )
    assert found["engine_difference"] < 1e-5
    squares = torch.tensor(found["squares"])
    assert len(squares) == 12
    assert found["by_depth"][1]["largest"] == pytest.approx(float(squares.max()))
    spread = ((squares / squares.mean() - 1) ** 2).mean()
    assert found["by_depth"][1]["spread"] == pytest.approx(float(spread))


def test_only_orthogonal_linear_networks_are_isometries():
    gaps = [
        isometry_gap(weights=weights, depth=8, width=20, device="cpu")["gap"]
        for weights in ("orthogonal", "gaussian")
    ]
    assert gaps[0] < 1e-13
    assert gaps[1] > 0.5


def test_training_starts_anew_with_each_learning_rate_and_stops_when_it_has_learned():
    torch.manual_seed(0)
    found = training(
        weights="orthogonal",
        depth=2,
        width=16,
        examples=20,
        learning_rates=[0.0, 0.5, 1e9],
        steps=60,
        learned=0.5,
        device="cpu",
    )
    still, learns, diverges = found["losses"]
    assert still == [learns[0]] * 61
    assert diverges[0] == learns[0]
    assert learns[-1] < 0.5 <= min(learns[:-1])
    assert len(diverges) == 2

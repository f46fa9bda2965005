"""What is read off singular values and accuracies of deep convolutional networks."""

import pytest
import torch

from ntk_callbacks.studies import DeepCNN

STUDY = DeepCNN([2, 5], [0.1, 0.01], seeds=2)


def made_up(job):
    if job["part"] == "linear":
        good = job["weights"] == "orthogonal" or job["padding"] == "zeros"
        return {"largest": 1.25 if good else 3.0, "smallest": 0.5}
    if job["part"] == "start":
        return {"gradient": [1.0, 2.0]}
    accuracy = 0.9 if job["weights"] == "orthogonal" else 0.2 + 0.1 * job["seed"]
    return {"accuracy": accuracy if job["rate"] == 0.01 else 0.1, "steps_taken": 3}


def test_numbers_of_known_results():
    results = {name: {**job, **made_up(job)} for name, job in STUDY.jobs().items()}
    results["training,gaussian,circular,depth=5,rate=0.1,seed=0"]["accuracy"] = 0.6
    findings = STUDY.findings(results)
    assert findings.numbers == pytest.approx(
        {
            "orthogonal_isometry_error": 0.5,
            "orthogonal_shallow_accuracy": 0.9,
            "orthogonal_deep_accuracy": 0.9,
            "orthogonal_circular_accuracy": 0.9,
            "gaussian_isometry_error": 2.0,
            "gaussian_shallow_accuracy": 0.25,  # the mean of two seeds
            "gaussian_deep_accuracy": 0.25,
            "gaussian_circular_accuracy": 0.6,
        }
    )
    rates = [row["best_rate"] for row in findings.table]
    assert rates == [0.01] * 3 + [0.01] * 2 + [0.1]


@pytest.mark.parametrize("padding", ["zeros", "circular"])
def test_one_gaussian_layer_is_no_isometry_and_orthogonal_ones_are(padding):
    torch.manual_seed(0)
    settings = {"part": "linear", "padding": padding, "channels": 2, "device": "cpu"}
    many = DeepCNN.run(weights="orthogonal", depth=9, **settings)
    one = DeepCNN.run(weights="gaussian", depth=1, **settings)
    assert many["largest"] == pytest.approx(1, abs=1e-13)
    assert many["smallest"] == pytest.approx(1, abs=1e-13)
    assert one["largest"] > 1.2
    assert one["smallest"] < 0.8


def test_training_ends_once_all_is_learned():
    settings = {"weights": "orthogonal", "padding": "zeros", "channels": 8}
    torch.manual_seed(0)
    found = DeepCNN.run(
        **{"part": "training", "depth": 3, "rate": 0.05, "steps": 80, **settings},
        examples=10,
        device="cpu",
    )
    assert found["accuracy"] >= 0.99
    assert 1 < found["steps_taken"] < 80

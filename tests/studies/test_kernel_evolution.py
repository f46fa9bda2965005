"""Kernels over epochs: curves against a plain loop, and what is found in them."""

import numpy as np
import pytest
import torch

from ntk_callbacks.experiments.models import MLP
from ntk_callbacks.studies.kernel_evolution import KernelEvolution, _noisy
from ntk_callbacks.studies.tasks import digits

SETTINGS = {
    **{"seed": 0, "epochs": [0, 2, 3], "examples": 20, "held_out": 30, "noise": 0.5},
    **{"distractors": 3, "width": 8, "depth": 1, "learning_rate": 0.3},
    **{"batch_size": 10, "device": "cpu"},
}


def kernel(model, x):
    """Mean over outputs of Θ, row by row from autograd."""
    total = 0
    for k in range(10):
        rows = []
        for output in model(x)[:, k]:
            grads = torch.autograd.grad(
                output, [*model.parameters()], retain_graph=True
            )
            rows.append(torch.cat([g.flatten() for g in grads]).double())
        total = total + torch.stack(rows) @ torch.stack(rows).T / 10
    return total.numpy()


def test_curves_against_a_plain_loop():
    torch.manual_seed(3)
    found = KernelEvolution.run(**SETTINGS)
    torch.manual_seed(3)
    x, labels = digits(20, dtype=torch.float32)
    x_test, labels_test = digits(30, held_out=True, dtype=torch.float32)
    x, x_test = _noisy(x, 0.5, 3), _noisy(x_test, 0.5, 3)
    assert x.shape == (20, 67)
    model = MLP((67,), 10, 8, 1, sigma_b=0.1)
    kernels, networks = [], []
    for epoch in range(4):
        if epoch in (0, 2, 3):
            kernels.append(kernel(model, torch.cat([x, x_test])))
            networks.append((model(x_test).argmax(1) == labels_test).double().mean())
        for batch in torch.randperm(20).split(10):
            model.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x[batch]), labels[batch])
            loss.backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.3 * p.grad

    def distance(a, b):
        a, b = a[:20, :20], b[:20, :20]
        return 1 - (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)

    def accuracy(theta):
        ridge = 1e-3 * np.trace(theta[:20, :20]) / 20
        y = np.eye(10)[labels.numpy()] - 0.1
        fit = np.linalg.solve(theta[:20, :20] + ridge * np.eye(20), y)
        return ((theta[20:, :20] @ fit).argmax(1) == labels_test.numpy()).mean()

    zero, two, three = kernels
    near = {"rel": 1e-3, "abs": 1e-6}
    assert found["kernel_distance"] == pytest.approx(
        [0, distance(two, zero), distance(three, zero)], **near
    )
    assert found["kernel_velocity"] == pytest.approx(
        [distance(two, zero) / 2, distance(three, two)], **near
    )
    assert found["after_kernel_accuracy"] == pytest.approx([*map(accuracy, kernels)])
    assert found["initial_kernel_accuracy"] == pytest.approx([accuracy(zero)] * 3)
    assert found["network_accuracy"] == pytest.approx([float(a) for a in networks])


def test_what_is_found():
    def result(gain):
        return {
            "kernel_distance": [0.0, 0.1, 0.2, 0.2],
            "kernel_velocity": [0.3, 0.4, 0.02],
            "target_alignment": [0.1, 0.2, 0.3, 0.5],
            "network_accuracy": [0.1, 0.5, 0.7, 0.8],
            "after_kernel_accuracy": [0.5, 0.6, 0.7, 0.5 + gain],
            "initial_kernel_accuracy": [0.5] * 4,
        }

    study = KernelEvolution([0, 1, 2, 4], early=2)
    found = study.findings({"a": result(0.1), "b": result(0.4)})
    assert found.numbers["velocity_ratio"] == pytest.approx(0.4 / 0.02)
    assert found.numbers["after_kernel_gain"] == pytest.approx(0.25)
    assert found.numbers["least_gain"] == pytest.approx(0.1)
    assert found.numbers["errors_ratio"] == pytest.approx(2)
    assert found.numbers["alignment_gain"] == pytest.approx(0.4)
    assert [row["velocity"] for row in found.table] == ["–", 0.3, 0.4, 0.02]

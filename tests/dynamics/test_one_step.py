"""What one step does, against the step itself."""

import json
from pathlib import Path

import pytest
import torch
from feature_models import FeatureModel, features, kernel
from torch import nn

from ntk_callbacks import TangentOperator, empirical_ntk
from ntk_callbacks.dynamics import (
    clipped_gradients,
    loss_change,
    loss_gradient,
    optimizer_scaling,
    output_change,
    predicted_step,
)

TABLE = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "linear_dynamics.json").read_text()
)


def half_square(f, y):
    return ((f - y) ** 2).sum() / 2


def sum_entropy(f, y):
    return nn.functional.cross_entropy(f, y, reduction="sum")


def test_table():
    ntk, f0, y = (
        torch.tensor(TABLE[k], dtype=torch.float64) for k in ("ntk", "f0", "y")
    )
    change = output_change(ntk, f0 - y, learning_rate=0.3)
    found = loss_change(f0[:, None], y[:, None], change[:, None])
    # −η rᵀΘr and with η²/2 rᵀΘ²r, by hand: r = (−0.7, 0.8, −0.4).
    assert found.first.item() == pytest.approx(-0.3564, abs=1e-14)
    assert found.total.item() == pytest.approx(-0.2933055, abs=1e-14)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_loss_gradient_is_that_of_torch(loss):
    f = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    if loss == "mse":
        y = torch.randn(4, 3, dtype=torch.float64)
        half_square(f, y).backward()
    else:
        y = torch.tensor([2, 0, 1, 1])
        sum_entropy(f, y).backward()
    found = loss_gradient(f, y, loss=loss)
    assert torch.allclose(found, f.grad, rtol=0, atol=1e-15)


def test_a_step_on_a_batch_moves_a_probe():
    """A network: what is left is of second order in the learning rate."""
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    batch, probe = torch.randn(5, 3).double(), torch.randn(4, 3).double()
    labels = torch.randint(0, 2, (5,))
    gradient = loss_gradient(net(batch), labels, loss="cross_entropy")
    ntk = empirical_ntk(net, probe, batch)
    before, start = net(probe).detach(), [p.detach().clone() for p in net.parameters()]

    def left(rate):
        for parameter, value in zip(net.parameters(), start, strict=True):
            parameter.data.copy_(value)
        net.zero_grad()
        sum_entropy(net(batch), labels).backward()
        torch.optim.SGD(net.parameters(), rate).step()
        change = net(probe).detach() - before
        predicted = output_change(ntk, gradient, learning_rate=rate)
        return change, (change - predicted).norm()

    (change, coarse), (_, fine) = left(1e-3), left(0.5e-3)
    assert coarse < 0.05 * change.norm()
    assert (coarse / fine).item() == pytest.approx(4, rel=0.02)


@pytest.mark.parametrize("by", [None, "example", "output", "class"])
def test_loss_change_of_squared_error_is_exact(by):
    f, y, change = torch.randn(3, 6, 2, dtype=torch.float64)
    labels = torch.tensor([0, 2, 2, 0, 1, 0])
    found = loss_change(f, y, change, by=labels if by == "class" else by).total
    each = ((f + change - y) ** 2 - (f - y) ** 2) / 2
    expected = {
        None: each.sum(),
        "example": each.sum(1),
        "output": each.sum(0),
        "class": torch.stack([each[labels == k].sum() for k in range(3)]),
    }[by]
    assert torch.allclose(found, expected, rtol=0, atol=1e-13)


def test_loss_change_of_cross_entropy_is_of_second_order():
    f, change = torch.randn(2, 6, 3, dtype=torch.float64)
    labels = torch.randint(0, 3, (6,))

    def left(size):
        exact = sum_entropy(f + size * change, labels) - sum_entropy(f, labels)
        found = loss_change(f, labels, size * change, loss="cross_entropy")
        each = loss_change(f, labels, size * change, loss="cross_entropy", by="example")
        assert torch.allclose(each.total.sum(), found.total, rtol=0, atol=1e-14)
        return (exact - found.total).item()

    assert left(2e-3) / left(1e-3) == pytest.approx(8, rel=0.02)


def test_layouts():
    phi, watched = features(5, 2, 9), features(3, 2, 9)
    gradient = torch.randn(5, 2, dtype=torch.float64)
    ntk = kernel(watched, phi)
    full = output_change(ntk, gradient, learning_rate=0.1)
    assert full.shape == (3, 2)
    matrix = ntk.transpose(1, 2).reshape(6, 10)
    flat = output_change(matrix, gradient, learning_rate=0.1)
    assert torch.equal(flat, full.flatten())
    shared = output_change(ntk[:, :, 0, 0], gradient)
    assert torch.allclose(shared, -ntk[:, :, 0, 0] @ gradient, rtol=0, atol=1e-15)
    independent = output_change(ntk.diagonal(dim1=2, dim2=3), gradient)
    assert torch.allclose(independent[:, 0], shared[:, 0], rtol=0, atol=1e-14)
    assert output_change(ntk[:0], gradient).shape == (0, 2)


# Optimizers, on a model whose outputs are linear in its parameters.


@pytest.fixture
def problem():
    phi, probe = features(5, 2, 12), features(3, 2, 12)
    return phi, probe, FeatureModel(12), torch.randn(5, 2, dtype=torch.float64)


FIRST_STEPS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
}


@pytest.mark.parametrize("name", FIRST_STEPS)
def test_the_preconditioned_kernel_predicts_a_first_step(problem, name):
    """Without a past Δf = −J Λ Jᵀ r, with the moments of the step itself in Λ."""
    phi, probe, model, y = problem
    optimizer = FIRST_STEPS[name](model.parameters())
    half_square(model(phi), y).backward()
    scaling = optimizer_scaling(optimizer, model, {"theta": model.theta.grad})
    ntk = empirical_ntk(model, probe, phi, scaling=scaling)
    before = model(probe).detach()
    predicted = output_change(ntk, loss_gradient(model(phi), y))
    optimizer.step()
    change = model(probe).detach() - before
    assert torch.allclose(predicted, change, rtol=0, atol=1e-12)


def test_predicted_steps_predict_outputs_with_momentum_decay_and_clipping(problem):
    phi, probe, model, y = problem
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        half_square(model(phi), y).backward()
        gradients = clipped_gradients({"theta": model.theta.grad}, max_norm=0.1)
        step = predicted_step(optimizer, model, gradients)
        predicted = TangentOperator(model, probe).jvp(step).view(3, 2)
        before = model(probe).detach()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        change = model(probe).detach() - before
        assert torch.allclose(predicted, change, rtol=0, atol=1e-14)


# Bad input.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: output_change(torch.eye(2), torch.ones(3)), "3 columns"),
        (
            lambda: output_change(torch.eye(2), torch.ones(2), learning_rate=-1.0),
            "learning_rate=-1",
        ),
        (
            lambda: loss_change(torch.ones(2, 2), torch.ones(2, 2), torch.ones(2, 3)),
            "expected the same shape",
        ),
        (
            lambda: loss_change(
                torch.ones(2, 2),
                torch.ones(2, 2),
                torch.ones(2, 2),
                by=torch.tensor([1, -1]),
            ),
            "integer labels",
        ),
        (lambda: loss_gradient(torch.ones(2, 2), torch.tensor([0, 1])), "one_hot"),
        (
            lambda: loss_gradient(
                torch.ones(2, 2), torch.tensor([0, 2]), loss="cross_entropy"
            ),
            "expected 0 … 1",
        ),
        (
            lambda: loss_gradient(
                torch.ones(2, 2), torch.ones(2, 2), loss="cross_entropy"
            ),
            "add up to 1",
        ),
        (
            lambda: loss_gradient(
                torch.ones(2), torch.tensor([0, 1]), loss="cross_entropy"
            ),
            "logits",
        ),
    ],
)
def test_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""Gradient flow against tables, neural-tangents, closed forms and small steps."""

import json
import math
from pathlib import Path

import pytest
import torch
from feature_models import FeatureModel, features, kernel
from torch import nn

from ntk_callbacks import as_matrix, empirical_ntk
from ntk_callbacks.dynamics import gradient_flow, kernel_regression

TABLE = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "linear_dynamics.json").read_text()
)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def table(*names):
    return [tensor(TABLE[name]) for name in names]


@pytest.mark.parametrize("time", ["0.5", "2.0", "10.0"])
def test_table(time):
    ntk, f0, y, ntk_test, f0_test = table("ntk", "f0", "y", "ntk_test", "f0_test")
    found = gradient_flow(ntk, f0, y, float(time), ntk_test=ntk_test, f0_test=f0_test)
    expected = TABLE["gradient_flow"][time]
    # The table has twelve decimals.
    assert torch.allclose(found.train, tensor(expected["train"]), rtol=0, atol=1e-12)
    assert torch.allclose(found.test, tensor(expected["test"]), rtol=0, atol=1e-12)


# A network with known numbers: neural-tangents 0.6.5, jax 0.4.25, float64.


@pytest.fixture
def fixed_net():
    """tanh(X W₁ᵀ) W₂ᵀ with weights that anyone can write down."""
    net = nn.Sequential(nn.Linear(3, 4, False), nn.Tanh(), nn.Linear(4, 2, False))
    net = net.double()
    net[0].weight.data = torch.cos(torch.arange(12.0).double()).view(4, 3)
    net[2].weight.data = torch.sin(0.7 * torch.arange(8.0).double()).view(2, 4)
    root = 2.0**0.5
    x = [[1, 0, 0], [0.6, 0.8, 0], [0, 0.6, 0.8], [-1, 0, 0], [0.5, -0.5, 0.5 * root]]
    x = tensor(x)
    return empirical_ntk(net, x), net(x).detach()


def test_half_mean_squared_error_of_neural_tangents(fixed_net):
    ntk, f0 = fixed_net
    y = tensor([[1, 0], [0, 1], [1, 1], [-1, 0], [0, -1]])
    times = tensor([0.0, 1.0, 10.0, 100.0])
    # ½ mean over 5 examples and 2 outputs at learning rate 1: s = 1/10.
    f = gradient_flow(ntk, f0, y, times / 10).train
    first = [
        [-0.3773378808053503, 0.5810448199336467],
        [0.30226213138776675, 0.38872752930326415],
        [0.8183399212832343, 0.2671394138094457],
        [0.7585154304705766, 0.07093290508655836],
    ]
    assert torch.allclose(f[:, 0], tensor(first), rtol=0, atol=1e-12)
    losses = ((f - y) ** 2).mean((1, 2)) / 2
    expected = [
        *(0.389022381041707, 0.1837320676409081),
        *(0.10746166261227937, 0.035128235798220456),
    ]
    assert torch.allclose(losses, tensor(expected), rtol=0, atol=1e-12)


def test_mean_cross_entropy_of_neural_tangents(fixed_net):
    ntk, f0 = fixed_net
    labels = torch.tensor([0, 1, 0, 1, 0])
    # −mean over the 5 × 2 numbers of logsoftmax(f)·onehot: s = 1/10.
    f = gradient_flow(ntk, f0, labels, [0.1, 1.0], loss="cross_entropy").train
    first = [[-0.0036334181, 0.2114194670], [0.6545046284, -0.4356796920]]
    # Integrated there to a tolerance of about 1e-7.
    assert torch.allclose(f[:, 0], tensor(first), rtol=0, atol=3e-7)
    losses = [nn.functional.cross_entropy(part, labels).item() / 2 for part in f]
    assert losses == pytest.approx([0.3166918033, 0.1696332958], abs=1e-7)


# Closed forms that share no code.


def problem(n=5, c=2, p=30, n_test=3):
    phi, phi_test = features(n, c, p), features(n_test, c, p)
    model = FeatureModel(p)
    y = torch.randn(n, c, dtype=torch.float64)
    return phi, phi_test, model, y


def test_against_the_matrix_exponential_in_the_space_of_parameters():
    """θ(t) = θ* + e^(−ΦᵀΦt)(θ₀ − θ*), then f = Φ θ."""
    phi, phi_test, model, y = problem()
    theta = model.theta.detach()
    flat = phi.flatten(0, 1)
    best = theta + torch.linalg.pinv(flat) @ (y.flatten() - flat @ theta)
    for t in (0.0, 0.03, 1.0, 20.0, 1e4):
        decay = torch.matrix_exp(-flat.mT @ flat * t)
        moved = best + decay @ (theta - best)
        found = gradient_flow(
            kernel(phi, phi),
            phi @ theta,
            y,
            t,
            ntk_test=kernel(phi_test, phi),
            f0_test=phi_test @ theta,
        )
        assert torch.allclose(found.train, phi @ moved, rtol=0, atol=1e-11)
        assert torch.allclose(found.test, phi_test @ moved, rtol=0, atol=1e-11)


def test_cross_entropy_of_one_example():
    """Two logits, Θ = λ I: d − e^(−d) falls by 2λt, d the margin by which it errs."""
    rate, f0 = 1.7, tensor([[0.3, 0.9]])
    ntk = rate * torch.eye(2, dtype=torch.float64)
    times = tensor([0.0, 0.1, 1.0, 10.0, 1000.0])
    f = gradient_flow(ntk, f0, torch.tensor([0]), times, loss="cross_entropy").train
    margin = f[:, 0, 1] - f[:, 0, 0]
    left = margin - torch.exp(-margin)
    expected = 0.6 - math.exp(-0.6) - 2 * rate * times
    assert torch.allclose(left, expected, rtol=1e-8, atol=1e-8)
    assert torch.allclose(f.sum(-1), tensor(1.2).expand(5, 1), rtol=0, atol=1e-9)


def test_cross_entropy_against_small_steps():
    """Euler steps in the space of parameters, extrapolated: errors of order h³."""
    phi, phi_test, model, _ = problem(4, 3, 20)
    labels = torch.tensor([0, 2, 1, 1])
    start = model.theta.detach()

    def euler(count, time=1.0):
        theta = start.clone()
        for _ in range(count):
            f = phi @ theta
            residual = f.softmax(-1) - nn.functional.one_hot(labels, 3)
            theta -= time / count * torch.einsum("ik,ikp->p", residual, phi)
        return torch.cat([phi, phi_test]) @ theta

    coarse, middle, fine = (euler(count) for count in (1000, 2000, 4000))
    once, twice = 2 * middle - coarse, 2 * fine - middle
    expected = (4 * twice - once) / 3
    found = gradient_flow(
        kernel(phi, phi),
        phi @ start,
        labels,
        1.0,
        loss="cross_entropy",
        ntk_test=kernel(phi_test, phi),
        f0_test=phi_test @ start,
    )
    assert torch.allclose(found.train, expected[:4], rtol=0, atol=1e-8)
    assert torch.allclose(found.test, expected[4:], rtol=0, atol=1e-8)


def test_probabilities_as_targets():
    phi, _, model, _ = problem(4, 3, 20)
    ntk, f0 = kernel(phi, phi), (phi @ model.theta).detach()
    labels = torch.tensor([0, 2, 1, 1])
    hard = nn.functional.one_hot(labels, 3)
    by_label = gradient_flow(ntk, f0, labels, 2.0, loss="cross_entropy")
    by_row = gradient_flow(ntk, f0, hard, 2.0, loss="cross_entropy")
    assert torch.equal(by_label.train, by_row.train)
    soft = (0.7 * hard + 0.1).double()
    late = gradient_flow(ntk, f0, soft, 300.0, loss="cross_entropy").train
    assert torch.allclose(late.softmax(-1), soft, rtol=0, atol=1e-4)


# Layouts.


def test_a_kernel_shared_by_the_outputs_is_one_for_each():
    ntk = kernel(phi := features(5, 1, 9), phi)[:, :, 0, 0]
    cross = torch.randn(3, 5, dtype=torch.float64) @ ntk
    f0, y = torch.randn(2, 5, 4, dtype=torch.float64)
    f0_test = torch.randn(3, 4, dtype=torch.float64)
    together = gradient_flow(ntk, f0, y, [0.5, 3.0], ntk_test=cross, f0_test=f0_test)
    assert together.train.shape == (2, 5, 4)
    assert together.test.shape == (2, 3, 4)
    for k in range(4):
        alone = gradient_flow(
            ntk, f0[:, k], y[:, k], [0.5, 3.0], ntk_test=cross, f0_test=f0_test[:, k]
        )
        assert torch.allclose(together.train[..., k], alone.train, rtol=0, atol=1e-13)
        assert torch.allclose(together.test[..., k], alone.test, rtol=0, atol=1e-13)


def test_a_matrix_with_outputs_is_read_example_major():
    phi, phi_test, model, y = problem()
    f0, f0_test = (phi @ model.theta).detach(), (phi_test @ model.theta).detach()
    ntk, cross = kernel(phi, phi), kernel(phi_test, phi)
    full = gradient_flow(ntk, f0, y, 1.5, ntk_test=cross, f0_test=f0_test)
    flat = gradient_flow(
        as_matrix(ntk), f0, y, 1.5, ntk_test=as_matrix(cross), f0_test=f0_test
    )
    assert torch.equal(full.train, flat.train)
    assert torch.equal(full.test, flat.test)


def test_any_observable_may_be_watched():
    """One number for each test row: here the difference of two logits."""
    phi, phi_test, model, y = problem()
    difference = phi_test[:, :1] - phi_test[:, 1:]
    start, watched = (phi @ model.theta).detach(), (difference @ model.theta).detach()
    cross = as_matrix_of(difference, phi)
    both = gradient_flow(
        kernel(phi, phi),
        start,
        y,
        1.0,
        ntk_test=kernel(phi_test, phi),
        f0_test=(phi_test @ model.theta).detach(),
    ).test
    alone = gradient_flow(
        kernel(phi, phi), start, y, 1.0, ntk_test=cross, f0_test=watched.flatten()
    ).test
    assert torch.allclose(alone, both[:, 0] - both[:, 1], rtol=0, atol=1e-13)


def as_matrix_of(first, second):
    return first.flatten(0, 1) @ second.flatten(0, 1).mT


# Ends and edges.


def test_it_starts_at_f0_to_the_last_bit_and_ends_at_y():
    phi, phi_test, model, y = problem()
    f0, f0_test = (phi @ model.theta).detach(), (phi_test @ model.theta).detach()
    ntk, cross = kernel(phi, phi), kernel(phi_test, phi)
    start, end = (
        gradient_flow(ntk, f0, y, t, ntk_test=cross, f0_test=f0_test)
        for t in (0.0, math.inf)
    )
    assert torch.equal(start.train, f0)
    assert torch.equal(start.test, f0_test)
    assert torch.allclose(end.train, y, rtol=0, atol=1e-13)
    expected = kernel_regression(ntk, y, cross, f0=f0, f0_test=f0_test)
    assert torch.allclose(end.test, expected, rtol=0, atol=1e-11)


def test_several_times_are_single_times():
    phi, _, model, y = problem()
    f0, ntk = (phi @ model.theta).detach(), kernel(phi, phi)
    times = [3.0, math.inf, 0.0, 0.4]
    for loss, wanted in (("mse", times), ("cross_entropy", [3.0, 0.4, 0.0, 0.4])):
        targets = y if loss == "mse" else y.softmax(-1)
        path = gradient_flow(ntk, f0, targets, wanted, loss=loss).train
        for t, f in zip(wanted, path, strict=True):
            alone = gradient_flow(ntk, f0, targets, t, loss=loss).train
            assert torch.allclose(f, alone, rtol=0, atol=1e-9)
    assert gradient_flow(ntk, f0, y, []).train.shape == (0, 5, 2)
    none = gradient_flow(ntk, f0, y.softmax(-1), [], loss="cross_entropy").train
    assert none.shape == (0, 5, 2)


@pytest.mark.parametrize("t", [0.7, 1e9, math.inf])
def test_what_a_singular_kernel_cannot_see_stays(t):
    """Fewer parameters than outputs: the end is the least-squares fit."""
    phi, phi_test, model, y = problem(5, 2, 4)
    theta, flat = model.theta.detach(), phi.flatten(0, 1)
    found = gradient_flow(
        kernel(phi, phi),
        phi @ theta,
        y,
        t,
        ntk_test=kernel(phi_test, phi),
        f0_test=phi_test @ theta,
    )
    gram = flat.mT @ flat
    best = torch.linalg.solve(gram, flat.mT @ y.flatten())
    moved = best  # by then; the slowest mode has λ ≈ 0.1
    if t < 1e3:
        moved = best + torch.matrix_exp(-gram * t) @ (theta - best)
    # At t = 1e9 round-off in the null directions has grown to 1e-16 t λ.
    atol = 1e-5 if t == 1e9 else 1e-11
    assert torch.allclose(found.train, phi @ moved, rtol=0, atol=atol)
    assert torch.allclose(found.test, phi_test @ moved, rtol=0, atol=atol)


def test_a_zero_kernel_never_learns():
    f0, y = torch.randn(2, 3, dtype=torch.float64)
    ntk = torch.zeros(3, 3)
    for t in (1.0, math.inf):
        assert torch.equal(gradient_flow(ntk, f0, y, t).train, f0)


def test_one_example_and_an_empty_test_set():
    ntk, f0, y = tensor([[2.0]]), tensor([0.0]), tensor([1.0])
    found = gradient_flow(
        ntk, f0, y, 0.5, ntk_test=torch.zeros(0, 1), f0_test=torch.zeros(0)
    )
    assert found.train.item() == pytest.approx(1 - math.exp(-1), abs=1e-15)
    assert found.test.shape == (0,)
    assert gradient_flow(ntk, f0, y, 0.5).test is None


def test_float32_is_taken_in_float64_and_gradients_are_left_behind():
    f0 = torch.zeros(2, requires_grad=True)
    found = gradient_flow(torch.eye(2), f0, torch.ones(2), 1.0).train
    assert found.dtype == torch.float64
    assert not found.requires_grad
    assert found[0].item() == pytest.approx(1 - math.exp(-1), abs=1e-15)

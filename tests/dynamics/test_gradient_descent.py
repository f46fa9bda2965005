"""Gradient descent in function space against tables and `torch.optim.SGD` itself."""

import json
import math
from pathlib import Path

import pytest
import torch
from feature_models import FeatureModel, features, kernel
from torch import nn

from ntk_callbacks import empirical_ntk
from ntk_callbacks.dynamics import (
    contraction_factors,
    gradient_descent,
    gradient_flow,
    learning_steps,
    max_learning_rate,
)

TABLE = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "linear_dynamics.json").read_text()
)
OPTIMIZERS = {
    "gd": {},
    "heavy_ball": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "light_nesterov": {"momentum": 0.3, "nesterov": True},
}


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def table(*names):
    return [tensor(TABLE[name]) for name in names]


@pytest.mark.parametrize("steps", [1, 5, 50])
def test_table(steps):
    ntk, f0, y, ntk_test, f0_test = table("ntk", "f0", "y", "ntk_test", "f0_test")
    found = gradient_descent(
        ntk,
        f0,
        y,
        learning_rate=0.3,
        steps=steps,
        ntk_test=ntk_test,
        f0_test=f0_test,
    )
    expected = TABLE["gradient_descent_lr_0.3"][str(steps)]
    # The table has twelve decimals.
    assert torch.allclose(found.train, tensor(expected["train"]), rtol=0, atol=1e-12)
    assert torch.allclose(found.test, tensor(expected["test"]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["heavy_ball", "nesterov"])
@pytest.mark.parametrize("rates", [0.3, [0.3] * 10], ids=["closed", "stepped"])
def test_table_of_momentum(name, rates):
    ntk, f0, y = table("ntk", "f0", "y")
    found = gradient_descent(
        ntk, f0, y, learning_rate=rates, steps=10, **OPTIMIZERS[name]
    )
    expected = tensor(TABLE[f"{name}_0.9_lr_0.3_10_steps"])
    assert torch.allclose(found.train, expected, rtol=0, atol=1e-12)


# A model linear in its parameters, trained by torch itself.


@pytest.fixture
def problem():
    """Features of a training and a test set, a model and targets."""
    phi, phi_test = features(6, 2, 40), features(3, 2, 40)
    return phi, phi_test, FeatureModel(40), torch.randn(6, 2, dtype=torch.float64)


def trained(problem, loss_fn, rates, batches=None, **options):
    """Outputs on both sets before and after each step of `torch.optim.SGD`."""
    phi, phi_test, model, _ = problem
    optimizer = torch.optim.SGD(model.parameters(), rates[0], **options)
    path = [(model(phi).detach(), model(phi_test).detach())]
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        batch = range(len(phi)) if batches is None else batches[step]
        loss_fn(model(phi), torch.as_tensor(batch)).backward()
        optimizer.step()
        path.append((model(phi).detach(), model(phi_test).detach()))
    return [torch.stack(side) for side in zip(*path, strict=True)]


def predicted(problem, y, **options):
    phi, phi_test, model, _ = problem
    with torch.no_grad():
        f0, f0_test = model(phi), model(phi_test)
    ntk, cross = kernel(phi, phi), kernel(phi_test, phi)
    return gradient_descent(ntk, f0, y, ntk_test=cross, f0_test=f0_test, **options)


def check(found, train, test, atol=1e-10):
    assert torch.allclose(found.train, train, rtol=0, atol=atol)
    assert torch.allclose(found.test, test, rtol=0, atol=atol)


def half_square(y):
    return lambda f, batch: ((f[batch] - y[batch]) ** 2).sum() / 2


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_hundred_steps_of_torch(problem, name):
    y, options = problem[3], OPTIMIZERS[name]
    rate = 0.2
    found = predicted(problem, y, learning_rate=rate, steps=range(101), **options)
    last = predicted(problem, y, learning_rate=rate, steps=100, **options)
    train, test = trained(problem, half_square(y), [rate] * 100, **options)
    check(found, train, test)
    check(last, train[-1], test[-1])
    assert (train[-1] - train[0]).abs().max() > 0.1  # it went somewhere


def test_the_kernel_of_a_linear_model_does_not_change(problem):
    phi, _, model, y = problem
    before = empirical_ntk(model, phi)
    trained(problem, half_square(y), [0.2] * 100, momentum=0.9)
    after = empirical_ntk(model, phi)
    assert (after - before).norm() < 1e-12 * before.norm()
    assert torch.allclose(before, kernel(phi, phi), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_schedule_of_learning_rates(problem, name):
    y, options = problem[3], OPTIMIZERS[name]
    rates = [0.2 * (1 + math.cos(step / 10)) for step in range(60)]
    found = predicted(problem, y, learning_rate=rates, steps=range(61), **options)
    check(found, *trained(problem, half_square(y), rates, **options))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_minibatches(problem, name):
    y, options = problem[3], OPTIMIZERS[name]
    batches = [torch.randperm(6)[: 1 + step % 3].tolist() for step in range(40)]
    batches[3] = [2, 2, 5]  # drawn with replacement
    found = predicted(
        problem, y, learning_rate=0.3, steps=range(41), batches=batches, **options
    )
    train, test = trained(problem, half_square(y), [0.3] * 40, batches, **options)
    check(found, train, test)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("drawn", [False, True])
def test_cross_entropy(problem, name, drawn):
    options = OPTIMIZERS[name]
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    batches = [torch.randperm(6)[:4] for _ in range(50)] if drawn else None

    def loss_fn(f, batch):
        return nn.functional.cross_entropy(f[batch], labels[batch], reduction="sum")

    found = predicted(
        problem,
        labels,
        learning_rate=0.3,
        steps=range(51),
        loss="cross_entropy",
        batches=batches,
        **options,
    )
    check(found, *trained(problem, loss_fn, [0.3] * 50, batches, **options))


def test_mean_losses_divide_the_learning_rate(problem):
    y = problem[3]
    found = predicted(problem, y, learning_rate=0.5 * 2 / (6 * 2), steps=range(31))
    loss_fn = nn.MSELoss()
    check(found, *trained(problem, lambda f, _: loss_fn(f, y), [0.5] * 30))


# Limits and laws.


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_just_below_and_above_the_largest_stable_rate(name):
    options = OPTIMIZERS[name]
    phi = features(5, 1, 20)
    ntk, y = kernel(phi, phi), torch.randn(5, 1, dtype=torch.float64)
    limit = max_learning_rate(ntk, **options).item()
    for factor, stable in ((0.98, True), (1.02, False)):
        rate = factor * limit
        slowest = contraction_factors(ntk, learning_rate=rate, **options).max().log()
        assert (slowest < 0) == stable
        # Long enough for the slowest mode to stand out, and then to move by e^±4.
        pause = math.ceil(4 / abs(slowest.item()))
        found = gradient_descent(
            ntk,
            0 * y,
            y,
            learning_rate=rate,
            steps=[2 * pause, 3 * pause],
            **options,
        )
        before, after = (found.train - y).flatten(1).norm(dim=1).tolist()
        assert math.log(after / before) == pytest.approx(-4 if stable else 4, abs=0.5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_contraction_factors_are_the_roots_of_the_recursion(name):
    options = OPTIMIZERS[name]
    beta, nesterov = options.get("momentum", 0.0), "nesterov" in options
    eigenvalues = torch.linspace(0.0, 3.0, 31).double()
    found = contraction_factors(
        torch.diag(eigenvalues), learning_rate=0.5, **options
    ).flip(0)
    for value, factor in zip(eigenvalues.tolist(), found.tolist(), strict=True):
        x, b = 0.5 * value, beta
        # (f, momentum buffer) -> (f, buffer), as SGD writes it, on ½ λ f².
        matrix = [[1 - x, -x * b], [1, b]]
        if nesterov:
            matrix = [[1 - x - x * b, -x * b * b], [1, b]]
        roots = torch.linalg.eigvals(tensor(matrix)).abs()
        # Double roots lose half of the digits.
        assert factor == pytest.approx(roots.max().item(), abs=1e-7)


def test_learning_steps_count_the_steps():
    ntk = torch.diag(tensor([1.0, 0.2, 0.0]))
    steps = learning_steps(ntk, learning_rate=0.5, fraction=0.1)
    assert steps[2] == math.inf
    ones = torch.ones(3).double()
    for k in range(2):
        before, after = math.floor(steps[k]), math.ceil(steps[k])
        left = gradient_descent(
            ntk, 0 * ones, ones, learning_rate=0.5, steps=[before, after]
        ).train
        assert 1 - left[0, k] >= 0.1 >= 1 - left[1, k]
    unstable = learning_steps(ntk, learning_rate=2.5)
    assert unstable[0] == math.inf
    heavy = learning_steps(ntk, learning_rate=0.01, momentum=0.5)
    # Small steps: momentum multiplies the learning rate by 1/(1 − β).
    assert heavy[1].item() == pytest.approx(0.5 / (0.01 * 0.2), rel=0.01)


def test_small_steps_are_gradient_flow():
    phi = features(4, 2, 20)
    ntk, y = kernel(phi, phi), torch.randn(4, 2, dtype=torch.float64)
    found = gradient_descent(ntk, 0 * y, y, learning_rate=1e-6, steps=2_000_000)
    flow = gradient_flow(ntk, 0 * y, y, 2.0)
    # The error is ½ η λ² t e^(−λt) and λ < 4.
    assert torch.allclose(found.train, flow.train, rtol=0, atol=1e-5)


def test_no_steps_and_no_learning_rate_leave_f0(problem):
    y = problem[3]
    f0 = problem[2](problem[0]).detach()
    assert torch.equal(predicted(problem, y, learning_rate=0.1, steps=0).train, f0)
    still = predicted(problem, y, learning_rate=0.0, steps=range(5), momentum=0.9)
    assert torch.equal(still.train, f0.expand(5, 6, 2))
    none = predicted(problem, y, learning_rate=0.1, steps=[])
    assert none.train.shape == (0, 6, 2)
    assert none.test.shape == (0, 3, 2)


def test_steps_in_any_order(problem):
    y = problem[3]
    path = predicted(problem, y, learning_rate=0.1, steps=range(9), momentum=0.5)
    some = predicted(
        problem, y, learning_rate=0.1, steps=torch.tensor([8, 0, 3, 3]), momentum=0.5
    )
    check(some, path.train[[8, 0, 3, 3]], path.test[[8, 0, 3, 3]], atol=1e-14)


def test_a_singular_kernel_moves_the_test_set_as_parameters_do():
    """More outputs than parameters, so that Θ has zero eigenvalues."""
    phi, phi_test, model = features(6, 2, 5), features(3, 2, 5), FeatureModel(5)
    y = torch.randn(6, 2, dtype=torch.float64)
    problem = phi, phi_test, model, y
    found = predicted(problem, y, learning_rate=0.2, steps=range(101), momentum=0.9)
    check(found, *trained(problem, half_square(y), [0.2] * 100, momentum=0.9))


def test_a_kernel_shared_by_the_outputs():
    phi = features(5, 1, 9)
    ntk = kernel(phi, phi)[:, :, 0, 0]
    f0, y = torch.randn(2, 5, 4, dtype=torch.float64)
    full = ntk[:, :, None, None] * torch.eye(4, dtype=torch.float64)
    for options in ({"learning_rate": 0.1}, {"learning_rate": [0.1] * 7}):
        shared = gradient_descent(ntk, f0, y, steps=7, momentum=0.9, **options)
        whole = gradient_descent(full, f0, y, steps=7, momentum=0.9, **options)
        assert torch.allclose(shared.train, whole.train, rtol=0, atol=1e-12)

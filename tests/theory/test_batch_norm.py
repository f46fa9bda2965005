"""Batch normalization: closed forms, sampled batches, and wide networks."""

import math

import pytest
import torch
from torch.nn import functional

from ntk_callbacks.theory import batch_norm_mean_field

# The same functions under names that bring no closed form.
TWINS = {
    "linear": lambda x: 1.0 * x,
    "relu": lambda x: x.clamp(min=0),
    "abs": lambda x: x.abs(),
}
FUNCTIONS = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": functional.gelu,
    "hard_tanh": functional.hardtanh,
}


# B, growth with ReLU, and the standard error of a measurement by others, n = 1000, that
# found 1.5248 and 1.4787.
B_MEASURED = [(32, 1.52195, 0.0082), (128, 1.47968, 0.0021)]


@pytest.mark.parametrize(("b", "expected", "error"), B_MEASURED)
def test_growth_at_finite_batches(b, expected, error):
    found = batch_norm_mean_field("relu", b).growth.item()
    assert found == pytest.approx(expected, abs=1e-5)
    assert found == pytest.approx({32: 1.5248, 128: 1.4787}[b], abs=error)


def directions(b, count):
    """`count` batches of b numbers, centered, mean square 1, isotropic."""
    g = torch.randn(count, b, dtype=torch.float64)
    g = g - g.mean(1, keepdim=True)
    return g / g.square().mean(1, keepdim=True).sqrt()


@pytest.mark.parametrize("b", [4, 5, 6, 8, 16, 64, 1000])
def test_linear_networks_explode_by_b_minus_2_over_b_minus_3(b):
    found = batch_norm_mean_field("linear", b)
    assert found.growth.item() == pytest.approx((b - 2) / (b - 3), rel=1e-12)
    assert found.q.item() == pytest.approx(1, rel=1e-12)
    assert found.c.item() == pytest.approx(-1 / (b - 1), rel=1e-12)


def test_relu_of_large_batches():
    found = batch_norm_mean_field("relu")
    assert found.growth.item() == pytest.approx(math.pi / (math.pi - 1), rel=1e-12)
    assert found.growth.item() == pytest.approx(1.46694220692, rel=1e-11)
    assert found.c.item() == pytest.approx(1 / math.pi)
    # Approached from above, as 1/B.
    gaps = [
        (batch_norm_mean_field("relu", b).growth - found.growth).item()
        for b in (10**3, 10**4)
    ]
    assert gaps[0] == pytest.approx(10 * gaps[1], rel=0.01)
    assert gaps[1] > 0


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("b", [5, 6, 16, 300])
def test_quadrature_finds_the_closed_forms(name, b):
    closed, found = (
        batch_norm_mean_field(name, b),
        batch_norm_mean_field(TWINS[name], b),
    )
    for part in ("q", "c", "growth"):
        assert getattr(found, part).item() == pytest.approx(
            getattr(closed, part).item(), rel=1e-7
        )


@pytest.mark.parametrize("name", ["tanh", "gelu", "hard_tanh", "sin", "silu"])
def test_large_batches_approach_the_limit(name):
    limit = batch_norm_mean_field(name)
    near, nearer = (batch_norm_mean_field(name, b) for b in (1000, 4000))
    for part in ("q", "c", "growth"):
        gaps = [abs(getattr(f, part) - getattr(limit, part)) for f in (near, nearer)]
        assert gaps[0] < 0.02
        assert gaps[1] < 0.3 * gaps[0] + 1e-12
    assert limit.growth > 1  # Poincaré


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("b", [5, 8, 20])
def test_growth_of_sampled_batches(name, b):
    """A gradient through BN and φ, by autograd, over random batches of one unit.

    The radius of the batch enters as E 1/χ²_{B−1} = 1/(B − 3).
    """
    count = 60_000
    phi = FUNCTIONS[name]
    field = batch_norm_mean_field(name, b)
    y = directions(b, count)
    value = phi(y)
    q = value.square().mean()
    shared = (value.sum(1) ** 2 - value.square().sum(1)).mean() / (b * (b - 1))
    assert q.item() == pytest.approx(field.q.item(), rel=0.02)
    apart = (field.q * (1 - field.c)).item()
    assert (q - shared).item() == pytest.approx(apart, rel=0.02)
    xi = torch.randn(count, b, dtype=torch.float64)
    xi = xi - xi.mean(1, keepdim=True)
    h = y.clone().requires_grad_()
    centered = h - h.mean(1, keepdim=True)
    normal = centered / centered.square().mean(1, keepdim=True).sqrt()
    (gradient,) = torch.autograd.grad((phi(normal) * xi).sum(), h)
    squares = gradient.square().sum(1)
    # h has radius √B here; in a network its square is (q − shared) χ²_{B−1}.
    ratio = squares.mean() / (b - 1) * b / ((b - 3) * (q - shared))
    assert ratio.item() == pytest.approx(field.growth.item(), rel=0.02)


def gradient_growth(phi, b, n, depth, generator):
    """Geometric mean over layers of how a gradient's mean square grows downward."""
    h = torch.randn(b, n, generator=generator)
    inputs = []
    h.requires_grad_()
    for _ in range(depth):
        inputs.append(h)
        normal = (h - h.mean(0)) / h.var(0, unbiased=False).sqrt()
        w = torch.randn(n, n, generator=generator) / n**0.5
        h = phi(normal) @ w.T
    loss = (h * torch.randn(b, n, generator=generator)).sum()
    gradients = torch.autograd.grad(loss, inputs)
    squares = torch.stack([g.double().square().sum() for g in gradients])
    # The first layer's input is not at the fixed point; the last gradient is not yet.
    return (squares[1] / squares[-3]).log() / (depth - 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "b", "target", "tolerance"),
    [
        ("linear", 6, 4 / 3, 0.05),
        ("linear", 16, 14 / 13, 0.015),
        ("relu", 512, 1.4669, 0.005),  # of B → ∞; at this B it is 1.4701
    ],
)
def test_gradients_of_wide_networks_explode_as_predicted(name, b, target, tolerance):
    """What n units take off grows with B/n: with B = 512, 0.005 at n = 1000."""
    phi = {"linear": lambda x: 1.0 * x, "relu": torch.relu}[name]
    generator = torch.Generator().manual_seed(0)
    n, seeds = (1000, 12) if b < 100 else (2000, 2)
    logs = [gradient_growth(phi, b, n, 24, generator) for _ in range(seeds)]
    growth = torch.stack(logs).mean().exp().item()
    assert growth == pytest.approx(target, abs=tolerance)
    assert growth == pytest.approx(
        batch_norm_mean_field(name, b).growth.item(), abs=tolerance
    )


@pytest.mark.slow
@pytest.mark.parametrize(("b", "expected", "error"), B_MEASURED)
def test_finite_batches_of_wide_relu_networks(b, expected, error):
    """More than the limit of large batches, 1.467."""
    generator = torch.Generator().manual_seed(1)
    logs = [gradient_growth(torch.relu, b, 1000, 20, generator) for _ in range(8)]
    growth = torch.stack(logs).mean().exp().item()
    assert growth == pytest.approx(expected, abs=4 * error + b / 20_000)


def test_bad_arguments_are_refused():
    for b in (3, 0, -4):
        with pytest.raises(ValueError, match=f"batch_size is {b}"):
            batch_norm_mean_field("relu", b)
    for b in (4, None):
        with pytest.raises(ValueError, match="constant"):
            batch_norm_mean_field(lambda x: 0 * x + 1, b)
    with pytest.raises(ValueError, match="expected one of"):
        batch_norm_mean_field("tan", 8)

"""Gaussian expectations of two arguments against quadrature and probabilities."""

import math

import pytest
import torch
from gaussian_sums import SMOOTH, TWINS, slope
from torch.nn import functional

from ntk_callbacks.theory import curvature_moment, moment, pair_moment
from ntk_callbacks.theory.activations import ACTIVATIONS

COSINES = torch.tensor(
    [-1, -1 + 1e-9, -0.999, -0.6, 0, 0.3, 0.95, 0.9999, 1 - 1e-7, 1 - 1e-12, 1],
    dtype=torch.float64,
)


def plane(function, q1, q2, q12, step=0.05):
    """E function(u, v) on a square grid of independent z₁, z₂."""
    z = torch.arange(-9, 9 + step / 2, step, dtype=torch.float64)
    density = step * (-(z**2) / 2).exp() / math.sqrt(2 * math.pi)
    u = math.sqrt(q1) * z[:, None]
    v = q12 / q1 * u + math.sqrt(q2 - q12**2 / q1) * z
    return (density[:, None] * density * function(u, v)).sum().item()


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("derivative", [0, 1])
@pytest.mark.parametrize("variances", [(1.0, 1.0), (0.3, 1.7), (30.0, 12.0)])
def test_closed_pairs_are_what_quadrature_finds(name, derivative, variances):
    q1, q2 = variances
    q12 = COSINES * math.sqrt(q1 * q2)
    closed, found = (
        pair_moment(a, q1, q2, q12, derivative=derivative) for a in (name, TWINS[name])
    )
    size = math.sqrt(
        moment(name, q1, derivative=derivative)
        * moment(name, q2, derivative=derivative)
    )
    assert torch.allclose(closed, found, rtol=0, atol=1e-10 * size)


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("cosine", [-0.9, 0.0, 0.5, 0.97])
def test_smooth_pairs_are_sums_on_a_grid(name, cosine):
    q1, q2 = 0.8, 1.5
    q12 = cosine * math.sqrt(q1 * q2)
    phi = ACTIVATIONS[name]
    expected = plane(lambda u, v: phi(u) * phi(v), q1, q2, q12)
    assert pair_moment(name, q1, q2, q12).item() == pytest.approx(expected, abs=1e-11)
    expected = plane(lambda u, v: slope(phi)(u) * slope(phi)(v), q1, q2, q12)
    found = pair_moment(name, q1, q2, q12, derivative=1).item()
    assert found == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("cosine", [-0.99999, -0.5, 0.3, 0.95, 0.9999, 1 - 1e-8])
@pytest.mark.parametrize(("q1", "q2"), [(1.0, 1.0), (0.4, 5.0)])
def test_kinked_pairs_are_probabilities(cosine, q1, q2):
    """E φ'(u) φ'(v) of hard tanh is P(|u| < 1, |v| < 1): one integral over u."""
    count = 4_000_000
    edge = 1 / math.sqrt(q1)
    z = (torch.arange(count, dtype=torch.float64) + 0.5) / count * 2 * edge - edge
    rest = math.sqrt(q2 * (1 - cosine) * (1 + cosine))
    center = cosine * math.sqrt(q2) * z
    inside = torch.special.ndtr((1 - center) / rest) - torch.special.ndtr(
        (-1 - center) / rest
    )
    density = (-(z**2) / 2).exp() / math.sqrt(2 * math.pi)
    expected = (inside * density).mean().item() * 2 * edge
    q12 = cosine * math.sqrt(q1 * q2)
    found = pair_moment("hard_tanh", q1, q2, q12, derivative=1).item()
    # The midpoint rule is off by (width/count)²/24 times a slope of at most 1/rest.
    assert found == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("gap", [1e-4, 1e-8, 1e-12, 1e-14])
def test_no_digits_are_lost_near_parallel_arguments(gap):
    """The angle is 2 arcsin √(gap/2); arccos(1 − gap) keeps half of its digits."""
    q12 = 1 - gap
    angle = 2 * math.asin(math.sqrt((1 - q12) / 2))
    found = pair_moment("relu", 1.0, 1.0, q12, derivative=1).item()
    assert found == pytest.approx((math.pi - angle) / (2 * math.pi), abs=1e-15)
    found = pair_moment("relu", 1.0, 1.0, -q12, derivative=1).item()
    assert found == pytest.approx(angle / (2 * math.pi), abs=1e-15)
    assert pair_moment("relu", 1.0, 1.0, 1.0, derivative=1).item() == 0.5


@pytest.mark.parametrize("activation", ["relu", "tanh", "hard_tanh", "erf", "sin"])
def test_pairs_are_symmetric_and_end_at_the_moment(activation):
    q = torch.rand(6, dtype=torch.float64) * 3 + 0.1
    factor = torch.randn(6, 9, dtype=torch.float64)
    factor = functional.normalize(factor, dim=1) * q[:, None].sqrt()
    q12 = factor @ factor.mT
    q12 = (q12 + q12.mT) / 2
    q12.diagonal().copy_(q)
    for derivative in (0, 1):
        pairs = pair_moment(activation, q[:, None], q[None], q12, derivative=derivative)
        assert torch.equal(pairs, pairs.mT)
        diagonal = moment(activation, q, derivative=derivative)
        assert torch.allclose(pairs.diagonal(), diagonal, rtol=0, atol=1e-10)
        assert torch.linalg.eigvalsh(pairs)[0] > 0


def test_shapes_are_broadcast_and_kept():
    assert moment("tanh", torch.ones(2, 3)).shape == (2, 3)
    assert moment("tanh", torch.ones(0)).shape == (0,)
    q = torch.ones(2, 1, 3)
    for activation in ("relu", "tanh"):
        pairs = pair_moment(activation, q, torch.ones(4, 1), torch.zeros(()))
        assert pairs.shape == (2, 4, 3)
        assert pairs.dtype == torch.float64


def test_numbers_that_are_no_covariances_are_refused():
    with pytest.raises(ValueError, match="q holds -1"):
        moment("relu", -1.0)
    with pytest.raises(ValueError, match="q holds nan"):
        curvature_moment("tanh", torch.tensor([1.0, torch.nan]))
    with pytest.raises(ValueError, match="q2 holds inf"):
        pair_moment("tanh", 1.0, torch.inf, 0.0)
    with pytest.raises(ValueError, match="exceeds √"):
        pair_moment("relu", 1.0, 2.0, torch.tensor([0.0, 1.5]))
    with pytest.raises(ValueError, match="exceeds √"):
        pair_moment("relu", 1.0, 2.0, torch.nan)
    with pytest.raises(ValueError, match="derivative 0 or 1"):
        moment("relu", 1.0, derivative=2)
    with pytest.raises(ValueError, match="power of at least 1"):
        moment("relu", 1.0, power=0)
    with pytest.raises(ValueError, match="expected 0 or 1"):
        pair_moment("relu", 1.0, 1.0, 0.0, derivative=-1)

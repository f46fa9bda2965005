"""Ensembles of models linear in their parameters, whose kernels are known for good.

f = Φ θ with θ ~ N(0, S): the NNGP kernel is Φ S Φᵀ and the NTK Φ Φᵀ.
"""

import math

import pytest
import torch
from torch import nn

from ntk_callbacks.dynamics import ensemble, gradient_flow, nngp_posterior


def problem(n=4, n_test=3, p=12):
    phi = torch.randn(n + n_test, p, dtype=torch.float64) / p**0.5
    root = torch.randn(p, p, dtype=torch.float64) / p**0.5
    return phi, root, torch.randn(n, dtype=torch.float64)


def kernels(phi, root):
    return phi @ root @ root.mT @ phi.mT, phi @ phi.mT


@pytest.mark.parametrize("t", [0.0, 0.5, 30.0, math.inf])
@pytest.mark.parametrize("p", [12, 3], ids=["regular", "singular"])
def test_in_the_space_of_parameters(t, p):
    """θ(t) is linear in θ(0), so that mean and covariance are those of a linear map."""
    phi, root, y = problem(p=p)
    seen = phi[:4]
    gram = seen.mT @ seen
    if t == math.inf:
        decay = torch.eye(p).double() - torch.linalg.pinv(seen) @ seen
    else:
        decay = torch.matrix_exp(-gram * t)
    target = (torch.eye(p).double() - decay) @ torch.linalg.pinv(seen) @ y
    found = ensemble(*kernels(phi, root), y, t)
    spread = phi @ decay @ root
    # matrix_exp is good to 1e-9 or so.
    assert torch.allclose(found.mean, phi @ target, rtol=0, atol=1e-8)
    assert torch.allclose(found.covariance, spread @ spread.mT, rtol=0, atol=1e-8)


def test_a_monte_carlo_ensemble_that_is_trained():
    """4000 models as columns, trained by small steps in the space of parameters."""
    phi, root, y = problem()
    draws, rate, steps = 4000, 0.005, 400
    theta = root @ torch.randn(12, draws, dtype=torch.float64)
    for _ in range(steps):
        theta -= rate * phi[:4].mT @ (phi[:4] @ theta - y[:, None])
    f = phi @ theta
    found = ensemble(*kernels(phi, root), y, rate * steps)
    sd = found.covariance.diagonal().sqrt()
    # Steps of finite size are off by ½ η λ² t e^(−λt) ≤ 2η/(e² t) = 7e-4 at most.
    assert (f.mean(1) - found.mean).abs().le(4 * sd / draws**0.5 + 3e-3).all()
    error = 4 * torch.outer(sd, sd) * (2 / draws) ** 0.5
    assert (torch.cov(f) - found.covariance).abs().le(error + 3e-3).all()
    assert (found.covariance.diagonal()[4:] > 0.02).all()  # so that it can tell


def test_a_monte_carlo_ensemble_of_single_predictions():
    phi, root, y = problem()
    draws, t = 20_000, 1.5
    f0 = phi @ root @ torch.randn(12, draws, dtype=torch.float64)
    nngp, ntk = kernels(phi, root)
    path = gradient_flow(
        ntk[:4, :4],
        f0[:4],
        y[:, None].expand(4, draws),
        t,
        ntk_test=ntk[4:, :4],
        f0_test=f0[4:],
    )
    f = torch.cat([path.train, path.test])
    found = ensemble(nngp, ntk, y, t)
    sd = found.covariance.diagonal().sqrt()
    assert (f.mean(1) - found.mean).abs().le(4 * sd / draws**0.5).all()
    error = 4 * torch.outer(sd, sd) * (2 / draws) ** 0.5
    assert (torch.cov(f) - found.covariance).abs().le(error).all()


def test_it_starts_at_the_prior_and_ends_on_the_targets():
    phi, root, y = problem()
    nngp, ntk = kernels(phi, root)
    times = ensemble(nngp, ntk, y, [0.0, 1.0, math.inf])
    assert times.mean.shape == (3, 7)
    assert times.covariance.shape == (3, 7, 7)
    assert not times.mean[0].any()
    assert torch.allclose(times.covariance[0], nngp, rtol=0, atol=1e-13)
    assert torch.allclose(times.mean[2, :4], y, rtol=0, atol=1e-12)
    assert times.covariance[2, :4, :4].abs().max() < 1e-20
    alone = ensemble(nngp, ntk, y, 1.0)
    assert torch.allclose(times.mean[1], alone.mean, rtol=0, atol=1e-15)
    assert torch.allclose(times.covariance[1], alone.covariance, rtol=0, atol=1e-15)


@pytest.mark.parametrize("t", [0.0, 1.0, 1e6, math.inf])
def test_covariances_are_symmetric_and_positive(t):
    phi, root, y = problem(n=20, n_test=20, p=30)
    for found in (
        ensemble(*kernels(phi, root), y, t),
        nngp_posterior(kernels(phi, root)[0], y, noise=0.1),
    ):
        assert torch.equal(found.covariance, found.covariance.mT)
        values = torch.linalg.eigvalsh(found.covariance)
        assert values[0] >= -1e-14 * values[-1]


def test_several_outputs_are_independent():
    phi, root, _ = problem()
    nngp, ntk = kernels(phi, root)
    y = torch.randn(4, 3, dtype=torch.float64)
    for found, alone in (
        (ensemble(nngp, ntk, y, 0.7), [ensemble(nngp, ntk, c, 0.7) for c in y.mT]),
        (nngp_posterior(nngp, y), [nngp_posterior(nngp, c) for c in y.mT]),
    ):
        assert found.mean.shape == (7, 3)
        for k, one in enumerate(alone):
            assert torch.allclose(found.mean[:, k], one.mean, rtol=0, atol=1e-13)
            assert torch.equal(found.covariance, one.covariance)


@pytest.mark.parametrize("noise", [0.0, 1e-3, 2.0])
def test_the_posterior_by_conditioning_a_joint_normal(noise):
    phi, root, y = problem()
    nngp, _ = kernels(phi, root)
    seen = nngp[:4, :4] + noise * torch.eye(4, dtype=torch.float64)
    gain = torch.linalg.solve(seen, nngp[:4]).mT
    found = nngp_posterior(nngp, y, noise=noise)
    assert torch.allclose(found.mean, gain @ y, rtol=0, atol=1e-10)
    expected = nngp - gain @ nngp[:4]
    assert torch.allclose(found.covariance, expected, rtol=0, atol=1e-10)


def test_the_posterior_of_repeated_points():
    """Two measurements of one value: the mean of both, with half the noise."""
    nngp = 1e6 * torch.ones(2, 2).double()
    found = nngp_posterior(nngp, torch.tensor([1.0, 3.0]).double(), noise=1.0)
    assert found.mean.tolist() == pytest.approx([2, 2], rel=1e-5)
    assert found.covariance[0, 0].item() == pytest.approx(0.5, rel=1e-5)
    exact = nngp_posterior(nngp, torch.tensor([1.0, 3.0]).double())
    assert exact.mean.tolist() == pytest.approx([2, 2], rel=1e-12)
    assert exact.covariance.abs().max() < 1e-8


def test_training_the_last_layer_only_is_the_posterior():
    """Θ = K: the ensemble at t = ∞ is the posterior without noise."""
    phi, root, y = problem()
    nngp, _ = kernels(phi, root)
    trained, posterior = ensemble(nngp, nngp, y, math.inf), nngp_posterior(nngp, y)
    assert torch.allclose(trained.mean, posterior.mean, rtol=0, atol=1e-11)
    assert torch.allclose(trained.covariance, posterior.covariance, rtol=0, atol=1e-11)


def test_all_points_are_training_points():
    phi, root, y = problem(n_test=0)
    found = ensemble(*kernels(phi, root), y, math.inf)
    assert torch.allclose(found.mean, y, rtol=0, atol=1e-12)


# Networks: one hidden layer of erf, whose kernels at infinite width are closed forms.

SIGMA_W, SIGMA_B = 1.5, 0.3


class ErfNetwork(nn.Module):
    """h = σ_w/√fan_in W a + σ_b b, twice, with standard normal weights."""

    def __init__(self, width):
        super().__init__()
        sizes = [(width, 4), (1, width)]
        normal = {"dtype": torch.float64}
        self.w = nn.ParameterList(torch.randn(size, **normal) for size in sizes)
        self.b = nn.ParameterList(torch.randn(size[0], **normal) for size in sizes)

    def forward(self, x):
        h = SIGMA_W / 2 * x @ self.w[0].mT + SIGMA_B * self.b[0]
        last = self.w[1]
        return SIGMA_W / last.shape[1] ** 0.5 * h.erf() @ last.mT + SIGMA_B * self.b[1]


def infinite_width(x):
    """NNGP kernel and NTK of `ErfNetwork` (Williams 1997; Jacot et al. 2018)."""
    first = SIGMA_W**2 * x @ x.mT / 4 + SIGMA_B**2
    size = 1 + 2 * first.diagonal()
    across = torch.outer(size, size)
    both = 2 / math.pi * torch.asin(2 * first / across.sqrt())
    slopes = 4 / math.pi / (across - 4 * first**2).sqrt()
    nngp = SIGMA_W**2 * both + SIGMA_B**2
    return nngp, nngp + SIGMA_W**2 * slopes * first


@pytest.mark.slow
def test_wide_networks_that_are_trained():
    """Mean and covariance over 400 networks of width 1024, by SGD up to t = 2."""
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([1.0, -1.0, 0.5])
    seeds, rate, steps = 400, 0.02, 100
    outputs = []
    for _ in range(seeds):
        net = ErfNetwork(1024)
        optimizer = torch.optim.SGD(net.parameters(), rate)
        for _ in range(steps):
            optimizer.zero_grad()
            ((net(x[:3])[:, 0] - y) ** 2).sum().div(2).backward()
            optimizer.step()
        with torch.no_grad():
            outputs.append(net(x)[:, 0])
    f = torch.stack(outputs, 1)
    nngp, ntk = infinite_width(x)
    found = ensemble(nngp, ntk, y, rate * steps)
    sd = found.covariance.diagonal().sqrt()
    # Four standard errors, and what width and step size leave.
    assert (f.mean(1) - found.mean).abs().le(4 * sd / seeds**0.5 + 0.02).all()
    error = 4 * torch.outer(sd, sd) * (2 / seeds) ** 0.5
    assert (torch.cov(f) - found.covariance).abs().le(error + 0.02).all()
    assert ((nngp - found.covariance).abs() > error + 0.04).any()  # so that it can tell


# Bad input.


def not_positive():
    return torch.tensor([[1.0, 2.0], [2.0, 1.0]]).double()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda k, y: ensemble(not_positive(), k, y, 1.0), r"ensemble \(nngp\)"),
        (lambda k, y: ensemble(k, not_positive(), y, 1.0), r"ensemble \(ntk\)"),
        (lambda k, y: ensemble(k, k, y, -1.0), "times ≥ 0"),
        (
            lambda k, _: ensemble(k, k, torch.ones(3).double(), 1.0),
            r"shape \(3,\) for kernels on 2 points",
        ),
        (lambda k, y: ensemble(k, k, y * torch.nan, 1.0), "y has entries"),
        (lambda k, y: ensemble(k * torch.nan, k, y, 1.0), "not finite"),
        (lambda k, y: nngp_posterior(k, y, noise=-1.0), "finite variance"),
        (lambda _, y: nngp_posterior(not_positive(), y), "eigenvalue -1"),
    ],
)
def test_what_is_no_ensemble(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.eye(2).double(), torch.ones(1).double())


def test_kernels_on_different_points():
    with pytest.raises(ValueError, match=r"\(2, 2\), ntk \(3, 3\)"):
        ensemble(torch.eye(2), torch.eye(3), torch.ones(1), 1.0)

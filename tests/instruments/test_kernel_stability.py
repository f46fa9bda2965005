"""The edge of stability against Hessians by autograd and optimizers that diverge."""

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn
from torch.nn.functional import cross_entropy

from ntk_callbacks import NTKOptions, Probe
from ntk_callbacks.instruments.kernel import KernelInstrument

N, D, C = 8, 4, 3
X = torch.randn(N, D, generator=torch.Generator().manual_seed(1)).double()
Y = torch.arange(N) % C
REAL = torch.randn(N, C, generator=torch.Generator().manual_seed(2)).double()
NAMES = ["sharpness", "sharpness_limit", "sharpness_ratio"]


def edge(net, optimizers, targets=Y, loss=None, **settings):
    options = NTKOptions(loss=loss)
    instrument = KernelInstrument(metrics=NAMES, options=options, **settings)
    instrument.optimizers = optimizers
    instrument.start(Probe(X, targets))
    found = instrument.measure(net, 0).scalars
    return [found.get(f"ntk/{name}") for name in NAMES]


def fabric_optimizer(net, optimizer):
    return Fabric(accelerator="cpu", devices=1).setup(net, optimizer)[1]


def lightning_optimizer(net, optimizer):
    return LightningOptimizer(optimizer)


def hessian(net, loss_fn, targets):
    """Of a linear model, for which it is the Gauss-Newton matrix; by autograd."""
    weight, bias = net.weight.detach(), net.bias.detach()

    def loss(flat):
        w, b = flat[: C * D].view(C, D), flat[C * D :]
        return loss_fn(X @ w.T + b, targets)

    flat = torch.cat([weight.flatten(), bias])
    return torch.autograd.functional.hessian(loss, flat)


@pytest.mark.parametrize(
    ("loss", "loss_fn", "targets"),
    [
        (None, cross_entropy, Y),
        ("cross_entropy_sum", nn.CrossEntropyLoss(reduction="sum"), Y),
        ("half_mean", lambda f, y: (f - y).square().sum() / (2 * N), REAL),
        ("mse_mean", nn.MSELoss(), REAL),
    ],
)
def test_sharpness_is_that_of_the_training_loss(loss, loss_fn, targets):
    net = nn.Linear(D, C).double()
    sgd = torch.optim.SGD(net.parameters(), 0.25)
    top = torch.linalg.eigvalsh(hessian(net, loss_fn, targets))[-1].item()
    sharpness, limit, ratio = edge(net, [sgd], targets, loss)
    assert sharpness == pytest.approx(top, rel=1e-9)
    assert limit == pytest.approx(8, rel=1e-12)
    assert ratio == pytest.approx(top / 8, rel=1e-9)


def test_what_is_assumed_of_real_targets_is_told_once():
    net = nn.Linear(D, C).double()
    sgd = torch.optim.SGD(net.parameters(), 0.25)
    named = edge(net, [sgd], REAL, "half_mean")
    instrument = KernelInstrument(metrics=[*NAMES, "residual_modes"])
    instrument.optimizers = [sgd]
    instrument.start(Probe(X, REAL))
    with pytest.warns(UserWarning, match=r"1/\(2n\).*mse_mean.*half_mean"):
        found = instrument.measure(net, 0).scalars
    instrument.measure(net, 1)  # warnings are errors here
    assert [found[f"ntk/{name}"] for name in NAMES] == named


def test_nothing_is_told_where_nothing_is_assumed():
    net = nn.Linear(D, C).double()
    instrument = KernelInstrument()
    instrument.start(Probe(X, REAL))
    instrument.measure(net, 0)
    edge(net, [torch.optim.SGD(net.parameters(), 0.25)], Y)


SGDS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.6, "dampening": 0.5},
]


@pytest.mark.parametrize("settings", SGDS, ids=str)
@pytest.mark.parametrize("factor", [0.97, 1.03])
def test_training_diverges_above_the_limit_and_not_below(settings, factor):
    net = nn.Linear(D, C).double()
    sgd = torch.optim.SGD(net.parameters(), 1.0, **settings)
    sharpness, limit, _ = edge(net, [sgd], REAL, "half_mean")
    sgd.param_groups[0]["lr"] = factor * limit / sharpness
    assert edge(net, [sgd], REAL, "half_mean")[2] == pytest.approx(factor, rel=1e-9)
    losses = []
    for _ in range(600):
        sgd.zero_grad()
        loss = (net(X) - REAL).square().sum() / (2 * N)
        loss.backward()
        sgd.step()
        losses.append(loss.item())
    assert (losses[-1] > 1e3 * losses[0]) == (factor > 1)
    assert (losses[-1] <= losses[0]) == (factor < 1)


def spectral_radius(decrement, beta):
    """Of m ← βm + (1 − β)g, x ← x − m with the gradient g = decrement · x."""
    kept = (1 - beta) * decrement
    return max(abs(np.linalg.eigvals([[1 - kept, -beta], [kept, beta]])))


@pytest.mark.parametrize("beta", [0.9, 0.5])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_is_measured_in_its_own_metric(kind, beta):
    net, rate = nn.Linear(D, C).double(), 0.01
    optimizer = kind(net.parameters(), rate, betas=(beta, 0.99))
    sharpness, limit, ratio = edge(net, [optimizer])
    assert np.isnan(sharpness)  # it has seen no gradient
    assert np.isnan(ratio)
    second = torch.zeros(C * D + C, dtype=torch.float64)
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(net(X), Y).backward()
        gradient = torch.cat([net.weight.grad.flatten(), net.bias.grad])
        second = 0.99 * second + 0.01 * gradient**2
        optimizer.step()
    root = (second / (1 - 0.99**3)).sqrt() + 1e-8
    matrix = hessian(net, cross_entropy, Y) / (root[:, None] * root).sqrt()
    top = torch.linalg.eigvalsh(matrix)[-1].item()
    sharpness, limit, ratio = edge(net, [optimizer])
    assert sharpness == pytest.approx(top, rel=1e-8)
    assert ratio == pytest.approx(top / limit, rel=1e-8)
    assert spectral_radius(rate * limit * 0.999, beta) < 1
    assert spectral_radius(rate * limit * 1.001, beta) > 1


def test_adagrad_is_measured_at_the_rate_of_its_next_step():
    net = nn.Linear(D, C).double()
    adagrad = torch.optim.Adagrad(net.parameters(), 0.5, lr_decay=1.0)
    for _ in range(2):
        adagrad.zero_grad()
        cross_entropy(net(X), Y).backward()
        adagrad.step()
    sharpness, limit, _ = edge(net, [adagrad])
    assert limit == pytest.approx(2 / 0.5, rel=1e-12)
    matrix = hessian(net, cross_entropy, Y)
    # What a gradient too small to change the sum of squares moves, next.
    before = torch.cat([net.weight.flatten(), net.bias]).detach()
    for parameter in (net.weight, net.bias):
        parameter.grad = torch.full_like(parameter, 1e-9)
    adagrad.step()
    after = torch.cat([net.weight.flatten(), net.bias]).detach()
    rates = (before - after) / 1e-9
    top = torch.linalg.eigvalsh(matrix * (rates[:, None] * rates).sqrt())[-1].item()
    assert sharpness == pytest.approx(top / 0.5, rel=1e-5)


def test_groups_with_rates_of_their_own_and_two_optimizers():
    net = nn.Linear(D, C).double()
    rates = torch.cat([torch.full((C * D,), 0.5), torch.full((C,), 0.1)]).double()
    matrix = hessian(net, cross_entropy, Y) * (rates[:, None] * rates).sqrt()
    top = torch.linalg.eigvalsh(matrix)[-1].item()
    groups = [{"params": [net.weight]}, {"params": [net.bias], "lr": 0.1}]
    one = [torch.optim.SGD(groups, 0.5)]
    two = [torch.optim.SGD([net.weight], 0.5), torch.optim.SGD([net.bias], 0.1)]
    for optimizers in (one, two):
        sharpness, limit, ratio = edge(net, optimizers)
        assert ratio == pytest.approx(top / 2, rel=1e-9)
        assert limit == pytest.approx(2 / 0.5)
        assert sharpness == pytest.approx(top / 0.5, rel=1e-9)


def test_what_no_optimizer_moves_has_no_share():
    net = nn.Linear(D, C).double()
    matrix = hessian(net, cross_entropy, Y)[: C * D, : C * D]
    top = torch.linalg.eigvalsh(matrix)[-1].item()
    found = edge(net, [torch.optim.SGD([net.weight], 0.5)])
    assert found[0] == pytest.approx(top, rel=1e-9)


class Lookahead(torch.optim.Optimizer):
    """Does more than to step what it holds, unlike a wrapper of a trainer."""

    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups, {})
        self.optimizer = optimizer


@pytest.mark.parametrize("wrapper", [lightning_optimizer, fabric_optimizer])
def test_wrappers_of_trainers_are_looked_into(wrapper):
    net = nn.Linear(D, C).double()
    _, limit, _ = edge(net, [wrapper(net, torch.optim.SGD(net.parameters(), 0.1))])
    assert limit == pytest.approx(20.0)


def test_optimizers_without_a_known_limit():
    net = nn.Linear(D, C).double()
    weight, bias = net.weight, net.bias
    apart = [
        torch.optim.SGD([weight], 0.1),
        torch.optim.SGD([bias], 0.1, momentum=0.5),
    ]
    top = torch.linalg.eigvalsh(hessian(net, cross_entropy, Y))[-1].item()
    for optimizers in (
        [],
        [torch.optim.Adamax(net.parameters())],
        [torch.optim.SGD(net.parameters(), 0.1, maximize=True)],
        [Lookahead(torch.optim.SGD(net.parameters(), 0.1))],
        apart,
    ):
        with pytest.warns(UserWarning, match=r"sharpness_limit \(.*edge of stability"):
            sharpness, limit, ratio = edge(net, optimizers)
        assert sharpness == pytest.approx(top, rel=1e-9)
        assert limit is None
        assert ratio is None


def test_a_rate_of_zero_has_no_limit():
    net = nn.Linear(D, C).double()
    _, limit, ratio = edge(net, [torch.optim.SGD(net.parameters(), 0.0)])
    assert (limit, ratio) == (np.inf, 0)
    sharpness, limit, _ = edge(net, [torch.optim.Adam(net.parameters(), 0.0)])
    assert np.isnan(sharpness)
    assert limit == np.inf

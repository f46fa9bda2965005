"""The largest stable learning rate against tables and against training itself."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from ntk_callbacks import empirical_ntk
from ntk_callbacks.dynamics import max_learning_rate

TABLE = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "infinite_width.json").read_text()
)["linear_dynamics"]

OPTIMIZERS = {
    "gd": {},
    "heavy_ball_0.9": {"momentum": 0.9},
    "nesterov_0.9": {"momentum": 0.9, "nesterov": True},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_table(name):
    ntk = torch.tensor(TABLE["ntk"], dtype=torch.float64)
    rate = max_learning_rate(ntk, **OPTIMIZERS[name])
    expected = TABLE["max_learning_rate"][name]
    assert rate.item() == pytest.approx(expected, rel=1e-13)


def test_a_full_kernel_is_read_as_its_matrix():
    ntk = torch.tensor(TABLE["ntk"], dtype=torch.float64)
    full = ntk[:, :, None, None] * torch.eye(2, dtype=torch.float64)
    assert max_learning_rate(full).item() == pytest.approx(
        max_learning_rate(ntk).item()
    )


def test_a_zero_kernel_is_stable_at_any_rate():
    assert max_learning_rate(torch.zeros(3, 3)) == math.inf


def test_float32_kernels_are_taken_in_float64():
    ntk = torch.tensor(TABLE["ntk"])
    assert max_learning_rate(ntk).dtype == torch.float64


@pytest.mark.parametrize("momentum", [-0.1, 1.0, 1.5])
def test_momentum_outside_its_interval(momentum):
    with pytest.raises(ValueError, match="momentum must be in"):
        max_learning_rate(torch.eye(2), momentum=momentum)


def test_momentum_allows_more_and_nesterov_less():
    plain = max_learning_rate(torch.eye(2)).item()
    assert plain == 2
    heavy = max_learning_rate(torch.eye(2), momentum=0.5).item()
    assert heavy == 3
    nesterov = max_learning_rate(torch.eye(2), momentum=0.5, nesterov=True).item()
    assert nesterov == 1.5


@pytest.mark.parametrize(
    ("momentum", "nesterov"),
    # torch.optim.SGD has no Nesterov without momentum
    [(0.0, False), (0.5, False), (0.9, False), (0.5, True), (0.9, True)],
)
def test_training_is_stable_just_below_and_divergent_just_above(momentum, nesterov):
    """A linear model, ½ Σ (f − y)², full batch: the limit is sharp."""
    x = torch.linalg.qr(torch.randn(6, 4, dtype=torch.float64))[0]
    y = torch.randn(6, 2, dtype=torch.float64)
    model = nn.Linear(4, 2).double()
    limit = max_learning_rate(
        empirical_ntk(model, x), momentum=momentum, nesterov=nesterov
    ).item()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}

    def losses(learning_rate, steps):
        model.load_state_dict(start)
        optimizer = torch.optim.SGD(
            model.parameters(), learning_rate, momentum=momentum, nesterov=nesterov
        )
        values = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = ((model(x) - y) ** 2).sum() / 2
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        return values

    # At (1 ± 0.02) of the limit every factor is at least 0.1 % off 1: 1500 steps tell.
    stable, divergent = losses(0.98 * limit, 1500), losses(1.02 * limit, 1500)
    design = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    fit = design @ torch.linalg.lstsq(design, y).solution
    best = ((fit - y) ** 2).sum().item() / 2
    assert stable[-1] == pytest.approx(best, rel=1e-6)
    assert not divergent[-1] < 1e3 * divergent[0]  # grown, or NaN

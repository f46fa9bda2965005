"""Λ against optimizers that were fed one and the same gradient for a long time."""

import pytest
import torch
from torch import nn

from ntk_callbacks import empirical_ntk
from ntk_callbacks.dynamics import optimizer_scaling
from ntk_callbacks.dynamics.optimizer_scaling import SCALINGS

STEADY = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "dampening": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.3),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "unused_dampening": lambda p: torch.optim.SGD(p, 0.1, dampening=0.3),
    "adam": lambda p: torch.optim.Adam(p, 0.01, eps=1e-3),
    "amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, torch.tensor(0.01), weight_decay=0.0),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, alpha=0.9, eps=1e-3),
    "rmsprop_momentum": lambda p: torch.optim.RMSprop(p, 0.01, 0.9, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1, lr_decay=0.01, eps=1e-3),
}


def feed(optimizer, net, gradient):
    before = net.weight.detach().clone()
    net.weight.grad = gradient.clone()
    optimizer.step()
    return net.weight.detach() - before


@pytest.mark.parametrize("name", STEADY)
def test_a_gradient_that_stays_moves_by_lambda_times_itself(name):
    net = nn.Linear(3, 2, bias=False).double()
    optimizer = STEADY[name](net.parameters())
    gradient = torch.randn(2, 3, dtype=torch.float64)
    for _ in range(3):  # larger ones at first, which amsgrad does not forget
        feed(optimizer, net, 50 * gradient)
    # 0.9^500 = 1e-23: the past is forgotten where it is ever.
    for _ in range(500):
        moved = feed(optimizer, net, gradient)
    found = optimizer_scaling(optimizer, net)["weight"]
    assert torch.allclose(-found * gradient, moved, rtol=1e-8, atol=1e-12)


def test_centered_rmsprop():
    net = nn.Linear(3, 2, bias=False).double()
    optimizer = torch.optim.RMSprop(net.parameters(), 0.01, centered=True)
    for _ in range(5):
        gradient = torch.randn(2, 3, dtype=torch.float64)
        moved = feed(optimizer, net, gradient)
    found = optimizer_scaling(optimizer, net)["weight"]
    assert torch.allclose(-found * gradient, moved, rtol=1e-10, atol=1e-15)


def test_gradients_give_the_moments_after_the_coming_step():
    net = nn.Linear(3, 2, bias=False).double()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    gradient = torch.randn(2, 3, dtype=torch.float64)
    coming = optimizer_scaling(optimizer, net, {"weight": gradient})["weight"]
    assert not optimizer.state
    feed(optimizer, net, gradient)
    assert torch.equal(optimizer_scaling(optimizer, net)["weight"], coming)


def test_every_rule_is_tried():
    net = nn.Linear(1, 1)
    tried = {type(make(net.parameters())) for make in STEADY.values()}
    assert tried == set(SCALINGS)


def test_groups_frozen_and_foreign_parameters():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)).double()
    net[2].bias.requires_grad_(False)
    optimizer = torch.optim.SGD(
        [
            {"params": net[0].parameters(), "lr": 0.1},
            {"params": net[1].parameters(), "lr": 0.2, "momentum": 0.5},
        ]
    )
    found = optimizer_scaling(optimizer, net)
    expected = [0.1, 0.1, 0.4, 0.4, 0.0]
    assert list(found.values()) == pytest.approx(expected)
    assert "2.bias" not in found
    assert list(optimizer_scaling(optimizer, net, parameters="bias")) == [
        "0.bias",
        "1.bias",
    ]
    x = torch.randn(3, 2, dtype=torch.float64)
    parts = empirical_ntk(net, x, by="module")
    whole = empirical_ntk(net, x, scaling=found)
    assert torch.allclose(whole, 0.1 * parts["0"] + 0.4 * parts["1"], atol=1e-13)


def test_adam_knows_nothing_before_its_first_step():
    net = nn.Linear(2, 2)
    for kind in (torch.optim.Adam, torch.optim.Adagrad):
        with pytest.raises(ValueError, match="has seen none yet"):
            optimizer_scaling(kind(net.parameters()), net)
    optimizer = torch.optim.Adam(net.parameters())
    net.weight.grad = torch.ones(2, 2)
    optimizer.step()
    assert optimizer_scaling(optimizer, net)["bias"] == 0  # it has never moved


def test_other_optimizers_are_refused_by_name():
    net = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="no rule for Rprop, only for SGD, Adam"):
        optimizer_scaling(torch.optim.Rprop(net.parameters()), net)


def test_climbing_is_refused_where_it_is_measured():
    """Δθ = −Λ ∂L/∂θ would have the wrong sign."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(
        [
            {"params": net[0].parameters()},
            {"params": net[1].parameters(), "maximize": True},
        ],
        lr=0.1,
    )
    with pytest.raises(ValueError, match=r"climbs, maximize=True for '1\.weight'"):
        optimizer_scaling(optimizer, net)
    found = optimizer_scaling(optimizer, net, parameters="^0")
    assert found == {"0.weight": 0.1, "0.bias": 0.1}

"""Residuals mode by mode under momentum: what real training does is what is predicted.

The models are linear and the losses squares, so that the recurrence of each mode is no
approximation; `torch.optim.SGD` is the oracle.
"""

import numpy as np
import pytest
import torch
from descending import (
    EXACT,
    SETTINGS,
    D,
    N,
    X,
    decays,
    half_mean,
    linear,
    residual_along,
    set_velocity,
    top_modes,
    update,
    watching,
)
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from ntk_callbacks import Probe


@pytest.mark.parametrize("counting", [True, False])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("loss", ["half_mean", "mse_mean"])
def test_every_interval_decays_as_predicted(settings, counting, loss):
    net = linear()
    loss_fn, rate = (half_mean, 0.2) if loss == "half_mean" else (nn.MSELoss(), 0.1)
    sgd = SGD(net.parameters(), rate, **settings)
    instrument = watching(sgd, loss=loss)
    _, directions = top_modes((X @ X.T + 1).numpy())
    instrument.measure(net, 0)
    assert not sgd.state  # looked into, not touched
    step, swings = 0, False
    for interval in (2, 6, 1):
        before = residual_along(net, directions)
        for _ in range(interval):
            if counting:
                instrument.count_step()
            update(net, sgd, loss_fn=loss_fn)
        step += interval
        found = instrument.measure(net, step).scalars
        real = residual_along(net, directions) / before
        assert decays("measured", found) == pytest.approx(real, **EXACT)
        assert decays("predicted", found) == pytest.approx(real, **EXACT)
        swings |= bool((real < -0.1).any())
    assert swings  # no rate of decay could tell that


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_velocity_is_that_of_the_optimizer(settings):
    """Buffers from elsewhere: a steady state, or rest, would not do."""
    net = linear()
    sgd = SGD(net.parameters(), 0.1, **settings)
    set_velocity(net, sgd)
    held = {p: sgd.state[p]["momentum_buffer"] for p in net.parameters()}
    instruments = {}
    for factor in (0.0, -1.0, 1.01, 1.0):  # the last is the true one
        for parameter, buffer in held.items():
            sgd.state[parameter]["momentum_buffer"] = factor * buffer
        instruments[factor] = watching(sgd)
        instruments[factor].measure(net, 0)
    for _ in range(4):
        for instrument in instruments.values():
            instrument.count_step()
        update(net, sgd)
    found = {k: i.measure(net, 4).scalars for k, i in instruments.items()}
    real = decays("measured", found[1.0])
    assert decays("predicted", found[1.0]) == pytest.approx(real, **EXACT)
    for factor in (0.0, -1.0, 1.01):
        assert (abs(decays("predicted", found[factor]) - real) > 1e-4).all()


@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_rates_and_momentum_that_change_at_every_step(dampening):
    """As under OneCycleLR; without momentum the optimizer leaves its buffers alone."""
    net = linear()
    sgd = SGD(net.parameters(), 0.1, momentum=0.9, dampening=dampening)
    instrument = watching(sgd)
    instrument.measure(net, 0)
    cycle = [(0.3, 0.0), (0.1, 0.9), (0.0, 0.5), (0.4, 0.8), (0.2, 0.0), (0.05, 0.95)]
    for interval in range(1, 4):
        for rate, momentum in cycle:
            sgd.param_groups[0] |= {"lr": rate, "momentum": momentum}
            instrument.count_step()
            update(net, sgd)
        found = instrument.measure(net, 6 * interval).scalars
        real = decays("measured", found)
        assert decays("predicted", found) == pytest.approx(real, **EXACT)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_steps_that_are_skipped_or_shortened(settings):
    net = linear()
    sgd = SGD(net.parameters(), 0.1, **settings)
    instrument = watching(sgd)
    instrument.measure(net, 0)
    for interval in range(1, 3):
        for share in (0.0, 0.3, 1.0, 0.0, 0.2):
            instrument.count_step(share=share)
            if share:
                update(net, sgd, share=share)
        found = instrument.measure(net, 5 * interval).scalars
        real = decays("measured", found)
        assert decays("predicted", found) == pytest.approx(real, **EXACT)
    instrument.count_step(share=float("nan"))
    update(net, sgd)
    assert np.isnan(decays("predicted", instrument.measure(net, 11).scalars)).all()
    instrument.count_step()
    update(net, sgd)
    found = instrument.measure(net, 12).scalars
    assert decays("predicted", found) == pytest.approx(decays("measured", found))


def test_only_skipped_steps_leave_everything_as_it_is():
    net = linear()
    sgd = SGD(net.parameters(), 0.1, momentum=0.9)
    update(net, sgd)
    instrument = watching(sgd)
    instrument.measure(net, 0)
    instrument.count_step(share=0.0)
    found = instrument.measure(net, 1).scalars
    assert (decays("predicted", found) == 1).all()


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_modes_of_cross_entropy_have_a_velocity(momentum):
    """To first order in the rate, of which buffers from elsewhere make the most."""
    net = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    labels = torch.arange(N) % 4
    labels[3] = -100
    probe = Probe(X, labels)
    sgd = SGD(net.parameters(), 1e-6, momentum=momentum)
    if momentum:
        set_velocity(net, sgd)
    instrument = watching(sgd, probe, None)
    instrument.measure(net, 0)
    for _ in range(3):
        instrument.count_step()
        update(net, sgd, probe, cross_entropy)
    found = instrument.measure(net, 3).scalars
    moved, expected = 1 - decays("measured", found), 1 - decays("predicted", found)
    assert moved == pytest.approx(expected, rel=2e-3)
    assert abs(expected).min() > 1e-9
    assert (expected < 0).any() == bool(momentum)  # gradients alone let none grow

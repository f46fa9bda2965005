"""Residuals mode by mode under momentum: what real training does is what is predicted.

The models are linear and the losses squares, so that the recurrence of each mode is no
approximation; `torch.optim.SGD` is the oracle.
"""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from ntk_callbacks import NTKOptions, Probe, TangentOperator
from ntk_callbacks.instruments.kernel import KernelInstrument

N, D = 12, 14
RNG = np.random.default_rng(8)
X = torch.tensor(RNG.standard_normal((N, D)))
Y = torch.tensor(RNG.standard_normal((N, 1)))
PROBE = Probe(X, Y)
SETTINGS = [
    {"momentum": 0.9},
    {"momentum": 0.6, "nesterov": True},
    {"momentum": 0.8, "dampening": 0.7},
]
EXACT = {"rel": 1e-8, "abs": 1e-10}


def half_mean(f, y):
    return (f - y).square().sum() / (2 * len(f))


def linear():
    return nn.Linear(D, 1).double()


def watching(optimizer, probe=PROBE, loss="half_mean", **options):
    instrument = KernelInstrument(
        metrics=["residual_modes"], options=NTKOptions(loss=loss, **options)
    )
    instrument.optimizers = [optimizer]
    instrument.start(probe)
    return instrument


def update(net, sgd, probe=PROBE, loss_fn=half_mean, share=1.0):
    sgd.zero_grad()
    loss_fn(net(probe.inputs), probe.targets).backward()
    for parameter in net.parameters():
        if parameter.grad is not None:
            parameter.grad *= share
    sgd.step()


def decays(what, scalars):
    return np.array([scalars[f"ntk_modes/decay_{what}/{k}"] for k in range(1, 9)])


def residual_along(net, directions):
    with torch.no_grad():
        return directions.T @ (net(X) - Y).numpy()[:, 0]


def top_modes(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return values[::-1][:8].copy(), vectors[:, ::-1][:, :8].copy()


def set_velocity(net, sgd):
    """Buffers that no gradient of this probe has to do with."""
    generator = torch.Generator().manual_seed(3)
    for parameter in net.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        sgd.state[parameter]["momentum_buffer"] = noise.to(parameter)


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


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("counted", [0, 2])
@pytest.mark.parametrize("before", [0, 3])
def test_a_resumed_run_predicts_what_an_unbroken_one_does(settings, counted, before):
    net = linear()
    sgd = SGD(net.parameters(), 0.1, **settings)
    for _ in range(before):
        update(net, sgd)
    going_on = watching(sgd)
    going_on.measure(net, before)
    for _ in range(counted):
        going_on.count_step()
        update(net, sgd)
    resumed = watching(sgd)
    resumed.load_state_dict(through_a_file(going_on.state_dict()))
    weights = through_a_file(net.state_dict())
    moments = copy.deepcopy(sgd.state_dict())
    found = []
    for instrument in (going_on, resumed):
        net.load_state_dict(weights)
        sgd.load_state_dict(copy.deepcopy(moments))  # which takes them as they are
        for _ in range(2):
            instrument.count_step()
            update(net, sgd)
        found.append(instrument.measure(net, before + counted + 2).scalars)
    assert found[0] == found[1]
    real = decays("measured", found[0])
    assert decays("predicted", found[0]) == pytest.approx(real, **EXACT)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_states_of_earlier_versions_know_no_velocity(momentum):
    net = linear()
    sgd = SGD(net.parameters(), 0.1, momentum=momentum)
    earlier = watching(sgd)
    earlier.measure(net, 0)
    state = earlier.state_dict()
    del state["modes"]["velocity"], state["modes"]["begins"]
    instrument = watching(sgd)
    instrument.load_state_dict(state)
    for step in (1, 2):
        instrument.count_step()
        update(net, sgd)
        found = instrument.measure(net, step).scalars
        if momentum and step == 1:
            assert np.isnan(decays("predicted", found)).all()
        else:
            real = decays("measured", found)
            assert decays("predicted", found) == pytest.approx(real, **EXACT)


def test_plain_descent_takes_no_product(monkeypatch):
    pushed = []
    whole = TangentOperator.jvp

    def counting(self, v):
        pushed.append(None)
        return whole(self, v)

    monkeypatch.setattr(TangentOperator, "jvp", counting)
    for settings, products in (({}, 0), ({"momentum": 0.5}, 1)):
        net = linear()
        sgd = SGD(net.parameters(), 0.1, **settings)
        instrument = watching(sgd)
        instrument.measure(net, 0)
        assert not pushed  # there is no momentum yet
        update(net, sgd)
        instrument.measure(net, 1)
        assert len(pushed) == products


class Late(nn.Module):
    """The second part may take part, or wait."""

    def __init__(self):
        super().__init__()
        self.first, self.second = linear(), linear()
        self.both = False

    def forward(self, x):
        return self.first(x) + self.second(x) if self.both else self.first(x)


@pytest.mark.parametrize("dampening", [0.0, 0.5])
@pytest.mark.parametrize("late", [True, False])
def test_a_parameter_without_a_buffer_begins_undampened(dampening, late):
    net = Late()
    sgd = SGD(net.parameters(), 0.05, momentum=0.8, dampening=dampening)
    for _ in range(2):
        update(net, sgd)
    net.both = late
    instrument = watching(sgd)
    instrument.measure(net, 2)
    for interval in range(1, 3):
        for _ in range(2):
            instrument.count_step()
            update(net, sgd)
        found = instrument.measure(net, 2 + 2 * interval).scalars
        if dampening and late and interval == 1:
            assert np.isnan(decays("predicted", found)).all()
        else:
            real = decays("measured", found)
            assert decays("predicted", found) == pytest.approx(real, **EXACT)


def test_buffers_of_sparse_gradients():
    tokens = torch.arange(N) % 5
    probe = Probe(tokens, Y)
    net = nn.Embedding(6, 1, sparse=True, dtype=torch.float64)
    sgd = SGD(net.parameters(), 0.3, momentum=0.5)
    update(net, sgd, probe)
    instrument = watching(sgd, probe)
    instrument.measure(net, 1)
    assert sgd.state[net.weight]["momentum_buffer"].is_sparse
    for _ in range(3):
        instrument.count_step()
        update(net, sgd, probe)
    found = instrument.measure(net, 4).scalars
    real = decays("measured", found)[:5]  # one for each token that occurs
    assert decays("predicted", found)[:5] == pytest.approx(real, **EXACT)


def test_groups_that_differ_in_their_momentum_have_no_rule():
    net = linear()
    groups = [
        {"params": [net.weight], "lr": 0.1, "momentum": 0.5},
        {"params": [net.bias], "lr": 0.02, "momentum": 0.9},  # of one η/(1 − β)
    ]
    sgd = SGD(groups)
    instrument = watching(sgd)
    instrument.measure(net, 0)
    update(net, sgd)
    found = instrument.measure(net, 1).scalars
    assert not [tag for tag in found if "decay_predicted" in tag]
    for group in groups:  # known from here on, but not how it began
        group |= {"lr": 0.1, "momentum": 0.5}
    for step in (2, 3):
        instrument.count_step()
        update(net, sgd)
        found = instrument.measure(net, step).scalars
        if step == 2:
            assert np.isnan(decays("predicted", found)).all()
    real = decays("measured", found)
    assert decays("predicted", found) == pytest.approx(real, **EXACT)


class Backwards(torch.autograd.Function):
    """Knows how to run backwards, once."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return 2 * grad


class Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = linear()

    def forward(self, x):
        return Backwards.apply(self.net(x))


@pytest.mark.parametrize(
    ("model", "options", "why"),
    [
        (Doubled, {}, "J·v cannot be computed"),
        # The kernel goes through the batch in less memory than J·v.
        (linear, {"mode": "train", "memory_budget": 3200}, "the joint batch needs"),
    ],
)
def test_where_there_is_no_product_it_is_told_once(model, options, why):
    net = model()
    sgd = SGD(net.parameters(), 0.02, momentum=0.5)
    instrument = watching(sgd, **options)
    instrument.measure(net, 0)  # needs none: there is no momentum yet
    update(net, sgd)
    with pytest.warns(UserWarning, match=f"decay_predicted is NaN.* {why}"):
        found = instrument.measure(net, 1).scalars
    real = decays("measured", found)
    assert decays("predicted", found) == pytest.approx(real, **EXACT)
    for step in (2, 3):  # warnings are errors here
        update(net, sgd)
        found = instrument.measure(net, step).scalars
        assert np.isnan(decays("predicted", found)).all()
        assert np.isfinite(decays("measured", found)).all()

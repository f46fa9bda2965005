"""The velocity of modes over checkpoints, and where it begins or is not known."""

import copy
import io

import numpy as np
import pytest
import torch
from descending import EXACT, SETTINGS, N, Y, decays, linear, update, watching
from torch import nn
from torch.autograd.function import once_differentiable
from torch.optim import SGD

from ntk_callbacks import Probe, TangentOperator


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

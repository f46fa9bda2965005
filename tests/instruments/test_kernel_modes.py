"""Residuals mode by mode: decays of real training beside those that are predicted."""

import io

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ntk_callbacks import NTKOptions, Probe
from ntk_callbacks.errors import ProbeError
from ntk_callbacks.instruments.kernel import KernelInstrument

N, D = 12, 14
RNG = np.random.default_rng(5)
X = RNG.standard_normal((N, D))
Y = RNG.standard_normal((N, 1))
PROBE = Probe(torch.tensor(X), torch.tensor(Y))


def half_mean(f, y):
    return (f - y).square().sum() / (2 * len(f))


SQUARES = NTKOptions(loss="half_mean")


def train(net, optimizer, probe, loss_fn, steps, instrument=None, rates=None):
    for step in range(steps):
        if rates is not None:
            optimizer.param_groups[0]["lr"] = rates[step]
        if instrument is not None:
            instrument.count_step()
        optimizer.zero_grad()
        loss_fn(net(probe.inputs), probe.targets).backward()
        optimizer.step()


def started(net, optimizer, probe=PROBE, loss="half_mean"):
    instrument = KernelInstrument(
        metrics=["residual_modes"], options=NTKOptions(loss=loss)
    )
    instrument.optimizers = [optimizer]
    instrument.start(probe)
    return instrument, instrument.measure(net, 0).scalars


def of(what, scalars):
    return np.array([scalars[f"ntk_modes/{what}/{k}"] for k in range(1, 9)])


def linear():
    return nn.Linear(D, 1).double()


def residual(net):
    with torch.no_grad():
        return (net(PROBE.inputs) - PROBE.targets).numpy()[:, 0]


@pytest.mark.parametrize(
    ("loss", "loss_fn", "factor"),
    [("half_mean", half_mean, 1 / N), ("mse_mean", nn.MSELoss(), 2 / N)],
)
@pytest.mark.parametrize("counting", [True, False])
def test_a_linear_model_decays_as_predicted(loss, loss_fn, factor, counting):
    net = linear()
    sgd = torch.optim.SGD(net.parameters(), 0.05)
    instrument, first = started(net, sgd, loss=loss)
    values, vectors = np.linalg.eigh(X @ X.T + 1)
    values, vectors = values[::-1][:8], vectors[:, ::-1][:, :8]
    before = vectors.T @ residual(net)
    assert of("residual", first) == pytest.approx(abs(before), rel=1e-9)
    assert np.isnan(of("decay_measured", first)).all()
    assert np.isnan(of("decay_predicted", first)).all()
    train(net, sgd, PROBE, loss_fn, 20, instrument if counting else None)
    found = instrument.measure(net, 20).scalars
    after = vectors.T @ residual(net)
    predicted = (1 - 0.05 * factor * values) ** 20
    assert of("residual", found) == pytest.approx(abs(after), rel=1e-7)
    assert of("decay_measured", found) == pytest.approx(after / before, rel=1e-7)
    assert of("decay_predicted", found) == pytest.approx(predicted, rel=1e-9)
    # The model is linear: real training and prediction are one.
    assert after / before == pytest.approx(predicted, rel=1e-7)


def test_rates_that_change_are_counted_step_by_step():
    net = linear()
    sgd = torch.optim.SGD(net.parameters(), 1.0)
    instrument, _ = started(net, sgd)
    rates = [0.3, 0.1, 0.02, 0.4, 0.0]
    train(net, sgd, PROBE, half_mean, 5, instrument, rates)
    found = instrument.measure(net, 5).scalars
    values = np.linalg.eigvalsh(X @ X.T + 1)[::-1][:8]
    predicted = np.prod([1 - rate * values / N for rate in rates], axis=0)
    assert of("decay_predicted", found) == pytest.approx(predicted, rel=1e-9)
    assert of("decay_measured", found) == pytest.approx(predicted, rel=1e-6)
    # The next interval starts anew.
    train(net, sgd, PROBE, half_mean, 1, instrument, [0.2])
    found = instrument.measure(net, 6).scalars
    predicted = 1 - 0.2 * values / N
    assert of("decay_predicted", found) == pytest.approx(predicted, rel=1e-9)
    assert of("decay_measured", found) == pytest.approx(predicted, rel=1e-6)


def test_modes_of_cross_entropy_are_those_of_the_weighted_kernel():
    """Deep network, small step: 1 − decay is ηsμ to first order, mode by mode."""
    net = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    labels = torch.arange(N) % 4
    labels[3] = -100  # cross-entropy leaves it out, and so do the modes
    probe = Probe(torch.tensor(X), labels)
    sgd = torch.optim.SGD(net.parameters(), 1e-5)
    instrument, _ = started(net, sgd, probe, None)
    train(net, sgd, probe, cross_entropy, 1, instrument)
    found = instrument.measure(net, 1).scalars
    measured, predicted = of("decay_measured", found), of("decay_predicted", found)
    assert (predicted < 1 - 1e-7).all()
    assert 1 - measured == pytest.approx(1 - predicted, rel=2e-3)


def test_momentum_speeds_a_slow_mode_up():
    net = linear()
    sgd = torch.optim.SGD(net.parameters(), 1e-4, momentum=0.9, dampening=0.5)
    instrument, _ = started(net, sgd)
    train(net, sgd, PROBE, half_mean, 500, instrument)
    found = instrument.measure(net, 500).scalars
    values = np.linalg.eigvalsh(X @ X.T + 1)[::-1][:8]
    # η (1 − dampening)/(1 − β) = 5e-4, once it has built up, in 10 of the 500 steps.
    steady = 500 * np.log(1 - 5e-4 * values / N)
    measured, predicted = of("decay_measured", found), of("decay_predicted", found)
    assert np.log(measured) == pytest.approx(steady, rel=0.03)
    assert predicted == pytest.approx(measured, rel=1e-9)


def test_no_prediction_where_the_rate_is_not_that_of_gradient_descent():
    net = linear()
    parameters = [{"params": [net.weight]}, {"params": [net.bias], "lr": 1.0}]
    for optimizer in (
        torch.optim.Adam(net.parameters()),
        torch.optim.SGD(parameters, 0.1),
        torch.optim.SGD(net.parameters(), 0.1, maximize=True),
    ):
        instrument, first = started(net, optimizer)
        train(net, optimizer, PROBE, half_mean, 2, instrument)
        for scalars in (first, instrument.measure(net, 2).scalars):
            assert not [tag for tag in scalars if "decay_predicted" in tag]
            assert "ntk_modes/decay_measured/1" in scalars


def test_a_step_is_counted_after_the_first_measurement_only():
    net = linear()
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    instrument = KernelInstrument(metrics=["residual_modes"], options=SQUARES)
    instrument.optimizers = [sgd]
    instrument.count_step()
    instrument.start(PROBE)
    instrument.measure(net, 0)
    found = instrument.measure(net, 0).scalars
    assert of("decay_measured", found) == pytest.approx(np.ones(8))
    assert of("decay_predicted", found) == pytest.approx(np.ones(8))


@pytest.mark.parametrize("counted", [0, 2])
def test_state_goes_through_a_file_in_the_middle_of_an_interval(counted):
    net = linear()
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    going_on, _ = started(net, sgd)
    train(net, sgd, PROBE, half_mean, counted, going_on, [0.3, 0.2])
    file = io.BytesIO()
    torch.save(going_on.state_dict(), file)
    file.seek(0)
    resumed = KernelInstrument(metrics=["residual_modes"], options=SQUARES)
    resumed.optimizers = [sgd]
    resumed.load_state_dict(torch.load(file, weights_only=True))
    resumed.start(PROBE)
    state = sgd.state_dict(), {k: v.clone() for k, v in net.state_dict().items()}
    found = []
    for instrument in (going_on, resumed):
        sgd.load_state_dict(state[0])
        net.load_state_dict(state[1])
        train(net, sgd, PROBE, half_mean, 1, instrument, [0.05])
        found.append(instrument.measure(net, counted + 1).scalars)
    assert found[0] == found[1]


def test_states_of_earlier_versions_are_taken():
    net = linear()
    instrument, _ = started(net, torch.optim.SGD(net.parameters(), 0.1))
    state = instrument.state_dict()
    del state["modes"], state["reference_parts"]
    later = KernelInstrument(metrics="all", by="module", options=SQUARES)
    later.load_state_dict(state)
    later.start(PROBE)
    found = later.measure(net, 3).scalars
    assert np.isnan(of("decay_measured", found)).all()
    assert not [tag for tag in found if "drift_share" in tag]


def test_targets_that_tell_no_loss():
    net = nn.Linear(D, 3).double()
    for targets in (None, torch.tensor(Y), torch.full((N,), 7), torch.arange(N)):
        probe = Probe(torch.tensor(X), targets)
        instrument = KernelInstrument(metrics=["residual_modes", "sharpness"])
        instrument.start(probe)
        with pytest.warns(UserWarning, match=r"residual_modes \(.*; sharpness \("):
            scalars = instrument.measure(net, 0).scalars
        assert [*scalars] == ["monitor/audit_error"]


@pytest.mark.parametrize(
    ("loss", "targets", "found"),
    [
        ("mse_mean", torch.arange(N) % 3, r"targets \(12,\) of torch.int64"),
        ("cross_entropy_mean", torch.arange(N), "labels from 0 to 11"),
        ("cross_entropy_mean", None, "no targets"),
        ("half_sum", torch.tensor(Y), r"targets \(12, 1\) of torch.float64"),
    ],
)
def test_targets_that_are_none_for_the_loss_are_refused(loss, targets, found):
    instrument = KernelInstrument(metrics=["sharpness"], options=NTKOptions(loss=loss))
    instrument.start(Probe(torch.tensor(X), targets))
    with pytest.raises(ProbeError, match=rf"loss='{loss}'.*\(12, 3\).*{found}"):
        instrument.measure(nn.Linear(D, 3).double(), 0)


def hidden():
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 1)).double()


@pytest.mark.parametrize(
    ("held", "parameters", "frozen", "predicted"),
    [
        ("2", None, False, False),  # the kernel is of more than what moves
        ("", r"^2\.", False, False),  # of less
        ("2", r"^2\.", False, True),
        ("", None, True, True),  # frozen layers are in neither
    ],
)
def test_decay_is_predicted_where_the_kernel_is_of_all_that_moves(
    held, parameters, frozen, predicted
):
    net = hidden()
    net[0].requires_grad_(not frozen)
    sgd = torch.optim.SGD([p for n, p in net.named_parameters() if held in n], 0.02)
    instrument = KernelInstrument(
        metrics=["residual_modes"], parameters=parameters, options=SQUARES
    )
    instrument.optimizers = [sgd]
    instrument.start(PROBE)
    instrument.measure(net, 0)
    train(net, sgd, PROBE, half_mean, 5, instrument)
    found = instrument.measure(net, 5).scalars
    assert ("ntk_modes/decay_predicted/1" in found) == predicted
    if predicted:  # only the last layer moved, in which the network is linear
        assert found["ntk_modes/decay_predicted/1"] == pytest.approx(
            found["ntk_modes/decay_measured/1"], rel=1e-6
        )

"""The twin against loops of the optimizers with explicit Jacobians."""

import copy
import io
import math
import pickle

import pytest
import torch
from instrumented import LABELS, batch, flat, inputs, network
from linearizations import jacobian_by_rows, measured, normalized
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, AdamW

from ntk_callbacks import Probe
from ntk_callbacks.instruments.linearization import LinearizationInstrument
from ntk_callbacks.instruments.linearization_options import LinearizationOptions


def sgd(gradients, weights, rates, momentum=0.0, nesterov=False, decay=0.0):
    """The last Δθ, by the recursion v ← βv + g."""
    v = 0.0
    for gradient, theta in zip(gradients, weights, strict=True):
        g = gradient + decay * theta
        v = momentum * v + g
    return -rates[-1] * (g + momentum * v if nesterov else v)


def adam(gradients, weights, rates, decay=0.0, decoupled=False):
    """The last Δθ; decay added to the gradient, or beside it (AdamW)."""
    m = s = torch.zeros_like(gradients[0])
    for gradient, theta in zip(gradients, weights, strict=True):
        g = gradient if decoupled else gradient + decay * theta
        m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g**2
    t = len(gradients)
    step = (m / (1 - 0.9**t)) / ((s / (1 - 0.999**t)).sqrt() + 1e-8)
    return -rates[-1] * (step + decay * weights[-1] if decoupled else step)


RULES = {
    "sgd": (lambda p: SGD(p, 0.3), sgd, {}),
    "momentum": (lambda p: SGD(p, 0.3, momentum=0.9), sgd, {"momentum": 0.9}),
    "nesterov": (
        lambda p: SGD(p, 0.3, momentum=0.8, nesterov=True, weight_decay=0.02),
        sgd,
        {"momentum": 0.8, "nesterov": True, "decay": 0.02},
    ),
    "adam": (lambda p: Adam(p, 0.05, weight_decay=0.1), adam, {"decay": 0.1}),
    "adamw": (
        lambda p: AdamW(p, 0.05, weight_decay=0.3),
        adam,
        {"decay": 0.3, "decoupled": True},
    ),
}


def train(net, optimizer, twin, steps, point, from_step=0, schedule=True):
    """A plain loop: two batches for a step, rates that fall."""
    for step in range(from_step, steps):
        if not twin.expanded:
            twin.expand(net, optimizer, point)
        optimizer.zero_grad()
        for part, weight in ((0, 0.25), (1, 0.75)):
            x, y = batch(2 * step + part)
            (weight * cross_entropy(net(x), y)).backward()
            twin.accumulate(net, x, y, weight)
        if schedule:
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
        twin.step(net, optimizer)
        optimizer.step()


@pytest.mark.parametrize("rule", RULES)
def test_twin_against_a_loop_with_explicit_jacobians(rule):
    make, formula, settings = RULES[rule]
    net = network()
    start = copy.deepcopy(net)
    instrument = LinearizationInstrument(
        twin=True, options=LinearizationOptions(threshold=1e-3)
    )
    x = inputs(5, 9)
    instrument.start(Probe(x, LABELS))
    untrained = measured(instrument, net, 0)
    optimizer = make(net.parameters())
    rate = optimizer.param_groups[0]["lr"]
    train(net, optimizer, instrument.twin, 5, instrument.point)
    found = measured(instrument, net, 5)

    theta0 = flat(start.parameters())
    theta, gradients, weights, rates = theta0.clone(), [], [], []
    for step in range(5):
        gradient = torch.zeros_like(theta)
        for part, weight in ((0, 0.25), (1, 0.75)):
            xs, ys = batch(2 * step + part)
            jacobian = jacobian_by_rows(start, xs)
            logits = start(xs).detach() + (jacobian @ (theta - theta0)).view(4, 3)
            slope = logits.softmax(1)
            slope[range(4), ys] -= 1
            gradient += weight * jacobian.T @ slope.reshape(-1) / 4
        rate *= 0.9
        gradients.append(gradient)
        weights.append(theta.clone())
        rates.append(rate)
        theta = theta + formula(gradients, weights, rates, **settings)
    f, f0 = net(x).detach(), start(x).detach()
    linear = f0 + (jacobian_by_rows(start, x) @ (theta - theta0)).view(5, 3)
    named = instrument.twin.parameters
    assert torch.allclose(flat(named.values()), theta, rtol=0, atol=1e-10)
    agree = (f.argmax(1) == linear.argmax(1)).sum().item() / 5
    expected = {
        "twin_output_distance": float((f - linear).norm() / (f - f0).norm()),
        "twin_loss": float(cross_entropy(linear, LABELS)),
        "twin_agreement": agree,
        "twin_parting_step": 5.0,
    }
    assert {k: found[k] for k in expected} == pytest.approx(expected, rel=1e-8)
    assert found["twin_output_distance"] > 1e-3
    assert found["twin_output_distance"] != found["output_distance"]
    assert untrained["twin_loss"] == untrained["loss"]
    assert math.isnan(untrained["twin_output_distance"])


def test_twin_of_a_linear_network_is_the_network():
    net = nn.Linear(3, 3).double()
    instrument = LinearizationInstrument(twin=True)
    instrument.start(Probe(inputs(5, 9), LABELS))
    instrument.measure(net, 0)
    optimizer = AdamW(net.parameters(), 0.1)
    train(net, optimizer, instrument.twin, 6, instrument.point)
    for name, tensor in net.named_parameters():
        assert torch.allclose(instrument.twin.parameters[name], tensor, atol=1e-13)
    assert measured(instrument, net)["twin_output_distance"] < 1e-12


def test_twin_through_batch_statistics():
    """mode="train": J₀ and f₀ of each joint batch, by rows."""
    net = normalized().train()
    start = copy.deepcopy(net)
    options = LinearizationOptions(mode="train")
    instrument = LinearizationInstrument(twin=True, options=options)
    instrument.start(Probe(inputs(5, 9), LABELS))
    instrument.measure(net, 0)
    optimizer = SGD(net.parameters(), 0.2)
    train(net, optimizer, instrument.twin, 3, instrument.point, schedule=False)
    theta0 = flat(start.parameters())
    theta = theta0.clone()
    for step in range(3):
        gradient = torch.zeros_like(theta)
        for part, weight in ((0, 0.25), (1, 0.75)):
            x, y = batch(2 * step + part)
            jacobian = jacobian_by_rows(start, x)
            logits = start(x).detach() + (jacobian @ (theta - theta0)).view(4, 3)
            slope = logits.softmax(1)
            slope[range(4), y] -= 1
            gradient += weight * jacobian.T @ slope.reshape(-1) / 4
        theta = theta - 0.2 * gradient
    found = flat(instrument.twin.parameters.values())
    assert torch.allclose(found, theta, rtol=0, atol=1e-10)


def test_layers_frozen_and_groups_added_on_the_way():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    net[1].requires_grad_(False)  # f is linear in the first layer
    instrument = LinearizationInstrument(twin=True)
    instrument.start(Probe(inputs(5, 9), LABELS))
    instrument.measure(net, 0)
    optimizer = SGD([net[0].weight], 0.1, momentum=0.9)
    train(net, optimizer, instrument.twin, 2, instrument.point)
    optimizer.add_param_group({"params": [net[0].bias], "lr": 0.02})
    train(net, optimizer, instrument.twin, 4, instrument.point, from_step=2)
    net[0].weight.requires_grad_(False)
    train(net, optimizer, instrument.twin, 6, instrument.point, from_step=4)
    for name, tensor in net.named_parameters():
        assert torch.allclose(instrument.twin.parameters[name], tensor, atol=1e-13)
    assert not torch.equal(net[0].bias, instrument.point.parameters["0.bias"])
    assert torch.equal(net[1].weight, instrument.twin.parameters["1.weight"])


@pytest.mark.parametrize("copied", ["saved", "pickled", "deep"])
def test_twin_goes_on_from_a_state(copied):
    options = LinearizationOptions(threshold=1e-6)

    def made():
        net = network()
        instrument = LinearizationInstrument(twin=True, options=options)
        instrument.start(Probe(inputs(5, 9), LABELS))
        instrument.measure(net, 0)
        return net, Adam(net.parameters(), 0.05), instrument

    net, optimizer, whole = made()
    train(net, optimizer, whole.twin, 3, whole.point)
    if copied == "saved":
        stream = io.BytesIO()
        torch.save(whole.state_dict(), stream)
        stream.seek(0)
        again = LinearizationInstrument(twin=True, options=options)
        again.load_state_dict(torch.load(stream, weights_only=True))
        again.start(Probe(inputs(5, 9), LABELS))
    elif copied == "pickled":
        again = pickle.loads(pickle.dumps(whole))
    else:
        again = copy.deepcopy(whole)
    other = copy.deepcopy((net, optimizer))
    assert measured(again, net, 3) == measured(whole, net, 3)
    train(net, optimizer, whole.twin, 6, whole.point, from_step=3)
    train(*other, again.twin, 6, again.point, from_step=3)
    assert measured(again, other[0], 6) == measured(whole, net, 6)
    assert measured(whole, net, 7)["twin_parting_step"] == 3.0


def test_training_leaves_no_trace():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.ReLU())
    net, x = net.double().train(), inputs(4, 0)
    instrument = LinearizationInstrument(twin=True)
    instrument.start(Probe(inputs(5, 9), LABELS))
    optimizer = Adam(net.parameters())
    net(x).sum().backward()
    generator = torch.get_rng_state()
    kept = copy.deepcopy(net.state_dict()), [p.grad.clone() for p in net.parameters()]
    instrument.measure(net, 0)
    instrument.twin.expand(net, optimizer, instrument.point)
    instrument.twin.accumulate(net, x, torch.tensor([0, 1, 2, 3]))
    instrument.twin.step(net, optimizer)
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(kept[0][k], v) for k, v in net.state_dict().items())
    grads = [p.grad for p in net.parameters()]
    assert all(map(torch.equal, kept[1], grads))
    assert not optimizer.state
    assert net.training

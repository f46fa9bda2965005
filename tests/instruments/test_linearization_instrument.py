"""Linearized networks against Jacobians by rows, loops of the optimizers, solves."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from instrumented import LABELS, batch, flat, inputs, network
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import SGD, Adam, AdamW

from ntk_callbacks import Probe
from ntk_callbacks.errors import (
    ProbeError,
    ProbeMismatchError,
    UnsupportedModelError,
)
from ntk_callbacks.instruments.after_kernel import kernel_accuracy
from ntk_callbacks.instruments.linearization import LinearizationInstrument
from ntk_callbacks.instruments.linearization_options import LinearizationOptions


def normalized(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    ).double()


def jacobian_by_rows(net, x):
    """∂f/∂θ of the joint batch, (n·c, p), one output after the other."""
    outputs = net(x).reshape(-1)
    weights = [*net.parameters()]
    rows = [
        flat(torch.autograd.grad(output, weights, retain_graph=True))
        for output in outputs
    ]
    return torch.stack(rows)


def measured(instrument, net, step=1):
    return {
        tag.removeprefix("linear/"): value
        for tag, value in instrument.measure(net, step).scalars.items()
    }


def moved(net, by=0.3):
    """Weights and buffers somewhere else."""
    generator = torch.Generator().manual_seed(5)
    for tensor in [*net.parameters(), *net.buffers()]:
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
            tensor.data += by * noise
    return net


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("make", [network, normalized])
@pytest.mark.parametrize("loss_fn", [None, mse_loss])
def test_every_number_against_the_jacobian_by_rows(make, mode, loss_fn):
    net, x = make().train(), inputs(5, 9)
    targets = LABELS if loss_fn is None else inputs(5, 8)
    start = copy.deepcopy(net).train(mode == "train")
    options = LinearizationOptions(mode=mode, threshold=1e-3)
    instrument = LinearizationInstrument(loss_fn=loss_fn, options=options)
    instrument.start(Probe(x, targets))
    first = measured(instrument, net, 0)
    moved(net)
    before = copy.deepcopy(net.state_dict())
    found = measured(instrument, net, 7)

    now = copy.deepcopy(net).train(mode == "train")
    change = flat(net.parameters()) - flat(start.parameters())
    f, f0 = now(x).detach(), start(x).detach()
    linear = f0 + (jacobian_by_rows(start, x) @ change).view(5, 3)
    loss = loss_fn or cross_entropy
    expected = {
        "output_distance": float((f - linear).norm() / (f - f0).norm()),
        "loss": float(loss(f, targets)),
        "loss_gap": float(loss(linear, targets) - loss(f, targets)),
        "parting_step": 7.0,
    }
    if loss_fn is None:
        agree = [
            int(a.argmax()) == int(b.argmax()) for a, b in zip(f, linear, strict=True)
        ]
        expected["agreement"] = sum(agree) / 5
    assert found == pytest.approx(expected, rel=1e-9)
    assert 0.01 < found["output_distance"] < 3
    assert first == pytest.approx(
        {**dict.fromkeys(expected, math.nan), "loss": float(loss(f0, targets))}
        | {"loss_gap": 0.0}
        | ({"agreement": 1.0} if loss_fn is None else {}),
        nan_ok=True,
    )
    assert net.training
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_agreement_counts_examples():
    """f = θ x with x = 1: f_lin is exact; outputs θ² part at chosen examples."""

    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = nn.Parameter(torch.tensor([[2.0, 1.0], [1.0, 2.0], [3.0, 1]]))

        def forward(self, x):
            return x @ self.theta.square()

    net, probe = Square(), Probe(torch.eye(3), torch.tensor([0, 1, 0]))
    instrument = LinearizationInstrument()
    instrument.start(probe)
    instrument.measure(net, 0)
    # θ² and θ₀² + 2θ₀Δ order the outputs of the first and third example otherwise.
    net.theta.data = torch.tensor([[-3.0, 1.5], [1.0, 3.0], [-2.0, 0.0]])
    f = net.theta.detach().square()
    linear = torch.tensor([[4.0 - 20, 1 + 1], [1, 4 + 4], [9 - 30, 1 - 2]])
    found = measured(instrument, net)
    assert found["agreement"] == pytest.approx(1 / 3)
    assert found["loss_gap"] == pytest.approx(
        float(
            cross_entropy(linear.double(), probe.targets)
            - cross_entropy(f.double(), probe.targets)
        ),
        rel=1e-6,
    )


def test_linear_networks_never_part():
    net = nn.Linear(3, 3).double()
    instrument = LinearizationInstrument(options=LinearizationOptions(threshold=1e-9))
    instrument.start(Probe(inputs(5, 9), LABELS))
    instrument.measure(net, 0)
    moved(net)
    found = measured(instrument, net)
    assert found["output_distance"] < 1e-14
    assert abs(found["loss_gap"]) < 1e-14
    assert found["agreement"] == 1.0
    assert math.isnan(found["parting_step"])


@pytest.mark.parametrize("share", [0.99, 1.01])
def test_parting_step_is_the_first_beyond_the_threshold(share):
    ways = [0.01, 0.05, 0.3, 0.01]

    def measurements(threshold):
        net = network()
        options = LinearizationOptions(threshold=threshold)
        instrument = LinearizationInstrument(options=options)
        instrument.start(Probe(inputs(5, 9), LABELS))
        instrument.measure(net, 0)
        start = copy.deepcopy(net.state_dict())
        for step, by in enumerate(ways, start=1):
            net.load_state_dict(start)
            yield measured(instrument, moved(net, by), 10 * step)

    distances = [found["output_distance"] for found in measurements(0.0)]
    assert distances[0] == distances[3] < distances[1] < distances[2]
    parted = [found["parting_step"] for found in measurements(share * distances[1])]
    first = 1 if share < 1 else 2  # the second measurement, or the third
    assert all(math.isnan(step) for step in parted[:first])
    assert parted[first:] == [10.0 * (first + 1)] * (4 - first)


# The twin ---------------------------------------------------------------------------


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


# Kernel regression ------------------------------------------------------------------


def traced_by_rows(net, x):
    rows = jacobian_by_rows(net, x).view(len(x), 3, -1).numpy()
    return np.einsum("ikp,jkp->ij", rows, rows) / 3


def solved(ntk, labels, held_out, ridge):
    n = len(labels)
    y = np.full((n, 3), -1 / 3)
    y[range(n), labels] += 1
    theta = ntk[:n, :n]
    shifted = theta + ridge * np.trace(theta) / n * np.eye(n)
    predicted = ntk[n:, :n] @ np.linalg.solve(shifted, y)
    return float((predicted.argmax(1) == held_out.numpy()).mean())


@pytest.mark.parametrize("ridge", [1e-3, 0.5])
def test_accuracies_against_a_solve(ridge):
    x, new = inputs(12, 1), inputs(40, 2)
    rule = torch.randn(3, 3, dtype=torch.float64)
    y, new_y = (x @ rule).argmax(1), (new @ rule).argmax(1)
    net = network()
    instrument = LinearizationInstrument(
        held_out=Probe(new, new_y), options=LinearizationOptions(ridge=ridge)
    )
    instrument.start(Probe(x, y))
    before = measured(instrument, net, 0)
    start = copy.deepcopy(net)
    optimizer = Adam(net.parameters(), 0.05)
    for _ in range(10):
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        optimizer.step()
    found = measured(instrument, net, 10)
    both = torch.cat([x, new])
    expected = {
        "network_accuracy": (net(new).argmax(1) == new_y).double().mean().item(),
        "after_kernel_accuracy": solved(traced_by_rows(net, both), y, new_y, ridge),
        "initial_kernel_accuracy": solved(traced_by_rows(start, both), y, new_y, ridge),
    }
    assert {k: found[k] for k in expected} == expected
    assert before["after_kernel_accuracy"] == expected["initial_kernel_accuracy"]
    assert len(set(expected.values())) == 3  # so that none passes for another
    assert min(expected.values()) > 0.4


def test_accuracy_counts_labeled_examples():
    ntk = torch.eye(3).repeat(2, 2).double()  # each held-out one is like one of probe
    labels = torch.tensor([0, 1, -100])
    asked = torch.tensor([0, 0, -100])
    assert kernel_accuracy(ntk, labels, asked, 2, ridge=1.0) == 0.5
    assert math.isnan(kernel_accuracy(ntk, labels, labels * 0 - 100, 2, ridge=0.0))


def test_inputs_of_several_tensors_are_joined():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, a, b):
            return self.net(a + b)

    net, x, new = Sum(), inputs(5, 1), inputs(5, 2)
    found = []
    for split in (lambda z: {"a": z, "b": 0 * z}, lambda z: (z - 1, 0 * z + 1)):
        instrument = LinearizationInstrument(held_out=Probe(split(new), LABELS))
        instrument.start(Probe(split(x), LABELS))
        found.append(measured(instrument, net, 0)["after_kernel_accuracy"])
    both = torch.cat([x, new])
    assert found == [solved(traced_by_rows(net.net, both), LABELS, LABELS, 1e-3)] * 2


# What cannot be ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"threshold": -1.0}, "threshold=-1.0"),
        ({"ridge": math.inf}, "ridge=inf"),
        ({"mode": "test"}, "mode='test'"),
        ({"name": "linear theory"}, "name='linear theory'"),
        ({"memory_budget": "many"}, "many"),
    ],
)
def test_options_are_checked(settings, what):
    with pytest.raises(ValueError, match=what):
        LinearizationOptions(**settings)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="loss_fn must be callable"):
        LinearizationInstrument(loss_fn="mse")
    with pytest.raises(ValueError, match="output_fn"):
        LinearizationInstrument(output_fn=3)
    with pytest.raises(ValueError, match='held_out is not for mode="train"'):
        LinearizationInstrument(
            held_out=Probe(torch.eye(3)), options=LinearizationOptions(mode="train")
        )
    with pytest.raises(RuntimeError, match=r"call start\(probe\) first"):
        LinearizationInstrument().measure(network(), 0)
    with pytest.raises(ProbeError, match="no targets to take a loss of"):
        LinearizationInstrument(loss_fn=mse_loss).start(Probe(torch.eye(3)))


@pytest.mark.parametrize(
    ("probe", "held_out", "what"),
    [
        (Probe(torch.eye(3)), Probe(torch.eye(3), LABELS[:3]), "the probe has targets"),
        (Probe(torch.eye(3), LABELS[:3]), Probe(torch.eye(3)), "held_out has targets"),
        (Probe(torch.eye(3), LABELS[:3]), Probe(torch.eye(3), torch.eye(3)), "(3, 3)"),
        (
            Probe((torch.eye(3),), LABELS[:3]),
            Probe((torch.eye(3), None, torch.eye(3)), LABELS[:3]),
            "of the same shape",
        ),
    ],
)
def test_held_out_examples_need_labels_and_the_same_shapes(probe, held_out, what):
    instrument = LinearizationInstrument(
        held_out=held_out,
        output_fn=lambda model, x: model(x if torch.is_tensor(x) else x[0]),
    )
    instrument.start(probe)
    with pytest.raises(ProbeError, match=what.replace("(", r"\(").replace(")", r"\)")):
        instrument.measure(network().float(), 0)


def test_other_probes_and_other_parameters_are_refused():
    net, probe = network(), Probe(inputs(5, 9), LABELS)
    instrument = LinearizationInstrument()
    instrument.start(probe)
    instrument.measure(net, 0)
    instrument.start(Probe(inputs(5, 9), LABELS))
    with pytest.raises(ProbeMismatchError, match="other examples"):
        instrument.start(Probe(inputs(5, 8), LABELS))
    net.append(nn.Linear(3, 3))
    with pytest.raises(UnsupportedModelError, match=r"3\.bias.*not those of the first"):
        instrument.measure(net, 1)


def test_random_networks_are_refused_at_once():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x + torch.randn_like(x))

    instrument = LinearizationInstrument()
    instrument.start(Probe(torch.eye(3), LABELS[:3]))
    with pytest.raises(UnsupportedModelError, match="random"):
        instrument.measure(Noisy(3, 3), 0)
    assert instrument.point is None


def test_what_a_twin_needs():
    net, x, y = network(), *batch(0)
    instrument = LinearizationInstrument(twin=True)
    instrument.start(Probe(x, y))
    instrument.measure(net, 0)
    twin, point = instrument.twin, instrument.point
    with pytest.raises(RuntimeError, match="call expand"):
        twin.accumulate(net, x, y)
    with pytest.raises(UnsupportedModelError, match=r"LBFGS.*without a closure"):
        twin.expand(net, torch.optim.LBFGS(net.parameters()), point)
    twin.expand(net, SGD(net.parameters(), 0.1), point)
    with pytest.raises(UnsupportedModelError, match=r"loss.*not known.*loss_fn"):
        twin.accumulate(net, x, x)
    with pytest.raises(UnsupportedModelError, match="cannot tell the targets"):
        twin.accumulate(net, x, None)


def test_targets_that_are_no_labels_are_told_of_once():
    net = network()
    instrument = LinearizationInstrument()
    instrument.start(Probe(inputs(5, 9), inputs(5, 8)))
    with pytest.warns(UserWarning, match="only outputs are compared") as caught:
        found = [measured(instrument, net, step) for step in range(3)]
    assert len(caught) == 1
    assert found[2].keys() == {"output_distance", "parting_step"}


def test_half_precision_weights_move_in_full():
    net = nn.Linear(3, 3).bfloat16()
    instrument = LinearizationInstrument()
    instrument.start(Probe(torch.eye(3), LABELS[:3]))
    instrument.measure(net, 0)
    net.weight.data += 0.5
    assert measured(instrument, net)["output_distance"] < 1e-6

"""Predicted steps against loops over rows, formulas of the optimizers, differences."""

import copy
from itertools import pairwise

import pytest
import torch
from instrumented import LABELS, batch, flat, network
from predictions import probe, trained
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import SGD, Adam, AdamW

from ntk_callbacks.instruments.prediction import PredictionInstrument


def jacobian_by_rows(net, x):
    """∂f/∂θ, (n·c, p), one output after the other."""
    rows = [
        flat(torch.autograd.grad(net(example[None])[0, k], [*net.parameters()]))
        for example in x
        for k in range(3)
    ]
    return torch.stack(rows)


def sgd(gradients, weights, lr=0.1, momentum=0.0, nesterov=False, decay=0.0):
    """Δθ of the last gradient, by the recursion v ← βv + g."""
    v = 0.0
    for gradient, theta in zip(gradients, weights, strict=True):
        g = gradient + decay * theta
        v = momentum * v + g
    return -lr * (g + momentum * v if nesterov else v)


def adam(gradients, weights, lr=0.01, decay=0.0, decoupled=False):
    """Δθ of the last gradient; decay added to the gradient, or beside it (AdamW)."""
    m = s = torch.zeros_like(gradients[0])
    for gradient, theta in zip(gradients, weights, strict=True):
        g = gradient if decoupled else gradient + decay * theta
        m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g**2
    t = len(gradients)
    step = (m / (1 - 0.9**t)) / ((s / (1 - 0.999**t)).sqrt() + 1e-8)
    return -lr * (step + decay * weights[-1] if decoupled else step)


RULES = {
    "sgd": (lambda p: SGD(p, 0.1), sgd, {}),
    "momentum": (lambda p: SGD(p, 0.1, momentum=0.9), sgd, {"momentum": 0.9}),
    "nesterov": (
        lambda p: SGD(p, 0.1, momentum=0.8, nesterov=True, weight_decay=0.02),
        sgd,
        {"momentum": 0.8, "nesterov": True, "decay": 0.02},
    ),
    "adam": (lambda p: Adam(p, 0.01, weight_decay=0.1), adam, {"decay": 0.1}),
    "adamw": (
        lambda p: AdamW(p, 0.01, weight_decay=0.3),
        adam,
        {"decay": 0.3, "decoupled": True},
    ),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("own_loss", [False, True])
def test_every_number_against_a_loop_and_the_formula(rule, own_loss):
    make, formula, settings = RULES[rule]
    net = network()
    optimizer = make(net.parameters())
    gradients, weights = [], []
    for step in range(4):
        optimizer.zero_grad()
        x, y = batch(step)
        cross_entropy(net(x), y).backward()
        gradients.append(flat(p.grad for p in net.parameters()))
        weights.append(flat(net.parameters()).clone())
        if step < 3:
            optimizer.step()
    watched = probe(torch.randn(5, 3) if own_loss else LABELS)
    loss_fn = mse_loss if own_loss else cross_entropy
    targets = watched.targets.double() if own_loss else LABELS
    instrument = PredictionInstrument(loss_fn=mse_loss if own_loss else None)
    instrument.start(watched)
    instrument.predict(net, optimizer, 4)

    jacobian = jacobian_by_rows(net, watched.inputs)
    change = formula(gradients, weights, **settings)
    by_optimizer = (jacobian @ change).view(5, 3)
    lr = optimizer.param_groups[0]["lr"]
    by_flow = (-lr * jacobian @ gradients[-1]).view(5, 3)
    f = net(watched.inputs).detach().requires_grad_()
    start = loss_fn(f, targets)
    (slope,) = torch.autograd.grad(start, f)
    optimizer.step()
    actual = (net(watched.inputs) - f).detach()
    loss = loss_fn(net(watched.inputs), targets)

    found = instrument.measure(net, 4).scalars
    gap = abs(loss - start - (slope * by_optimizer).sum())
    expected = {
        "loss": loss,
        "loss_change_actual": loss - start,
        "loss_change_optimizer": (slope * by_optimizer).sum(),
        "loss_change_gradient_flow": (slope * by_flow).sum(),
        "loss_change_linearized": loss_fn(f + by_optimizer, targets) - start,
        "explained": 1 - gap / abs(loss - start),
        "output_cosine": (actual * by_optimizer).sum()
        / (actual.norm() * by_optimizer.norm()),
        "output_error": (actual - by_optimizer).norm() / actual.norm(),
        "step_error": 0.0,
    }
    assert found == pytest.approx(
        {
            f"prediction/{k}": float(torch.as_tensor(v).detach())
            for k, v in expected.items()
        },
        rel=1e-8,
    )
    changes = instrument.changes
    assert changes.step == 4
    for seen, known in [
        (changes.outputs, f.detach()),
        (changes.actual, actual),
        (changes.optimizer, by_optimizer),
        (changes.gradient_flow, by_flow),
    ]:
        torch.testing.assert_close(seen, known, rtol=1e-9, atol=1e-13)


def test_small_steps_are_explained_and_their_remainder_is_of_second_order():
    """Finite differences: ΔL and Δf of steps that shrink by ten."""
    errors = []
    for lr in (1e-3, 1e-4, 1e-5):
        net = network()
        optimizer = SGD(net.parameters(), lr)
        trained(net, optimizer, steps=0)
        instrument = PredictionInstrument()
        instrument.start(probe())
        instrument.predict(net, optimizer, 1)
        optimizer.step()
        found = instrument.measure(net, 1).scalars
        errors.append(
            [1 - found["prediction/explained"], found["prediction/output_error"]]
        )
    for large, small in pairwise(errors):
        assert [a / b for a, b in zip(large, small, strict=True)] == pytest.approx(
            [10, 10], rel=0.05
        )
    assert max(errors[-1]) < 2e-4


def test_gradient_flow_is_the_kernel_between_probe_and_batch():
    """−η Θ(probe, batch) ∇_f L, with the kernel formed in full."""
    from ntk_callbacks import empirical_ntk
    from ntk_callbacks.dynamics import loss_gradient, output_change

    net = network()
    optimizer = AdamW(net.parameters(), 0.02)
    trained(net, optimizer)
    x, y = batch(3)
    cross = empirical_ntk(net, probe().inputs, x)
    gradient = loss_gradient(net(x), y, loss="cross_entropy") / len(x)
    expected = output_change(cross, gradient, learning_rate=0.02)
    instrument = PredictionInstrument()
    instrument.start(probe())
    instrument.predict(net, optimizer, 1)
    optimizer.step()
    instrument.measure(net, 1)
    torch.testing.assert_close(instrument.changes.gradient_flow, expected)


def test_rates_by_group_and_a_maximized_group():
    net = network()
    groups = [
        {"params": [*net[0].parameters()], "lr": 0.3},
        {"params": [*net[2].parameters()], "lr": 0.01, "maximize": True},
    ]
    optimizer = SGD(groups)
    trained(net, optimizer, steps=0)
    instrument = PredictionInstrument()
    instrument.start(probe())
    instrument.predict(net, optimizer, 1)
    jacobian = jacobian_by_rows(net, probe().inputs)
    rates = torch.cat([torch.full((24,), 0.3), torch.full((21,), -0.01)]).double()
    step = -rates * flat(p.grad for p in net.parameters())
    optimizer.step()
    instrument.measure(net, 1)
    for seen in (instrument.changes.optimizer, instrument.changes.gradient_flow):
        torch.testing.assert_close(seen, (jacobian @ step).view(5, 3))


def test_clipped_gradients_move_the_optimizer_alone():
    net = network()
    optimizer = SGD(net.parameters(), 0.1)
    trained(net, optimizer, steps=0)
    raw = {name: p.grad.clone() for name, p in net.named_parameters()}
    length = nn.utils.clip_grad_norm_(net.parameters(), 0.01)
    instrument = PredictionInstrument()
    instrument.start(probe())
    instrument.predict(net, optimizer, 1, gradients=raw)
    by_default = copy.deepcopy(instrument)
    applied = {name: p.grad for name, p in net.named_parameters()}
    instrument.load_state_dict({})
    instrument.predict(net, optimizer, 1, gradients=raw, applied=applied)
    optimizer.step()
    found = instrument.measure(net, 1).scalars
    assert found["prediction/step_error"] == 0.0
    changes = instrument.changes
    torch.testing.assert_close(changes.optimizer * length / 0.01, changes.gradient_flow)
    # Not told of the clipping, it predicts a step that was not made.
    error = by_default.measure(net, 1).scalars["prediction/step_error"]
    assert error == pytest.approx(float(length) / 0.01 - 1, rel=1e-4)


def test_steps_of_two_optimizers_add_up_to_one_update():
    net = network()
    first, last = SGD(net[0].parameters(), 0.1), Adam(net[2].parameters(), 0.01)
    instrument = PredictionInstrument()
    instrument.start(probe())
    x, y = batch(0)
    start = flat(net.parameters()).clone()
    jacobian = jacobian_by_rows(net, probe().inputs)
    for optimizer in (first, last, first):
        net.zero_grad()
        cross_entropy(net(x), y).backward()
        instrument.predict(net, optimizer, 1)
        optimizer.step()
    found = instrument.measure(net, 1).scalars
    assert found["prediction/step_error"] < 1e-12
    expected = (jacobian @ (flat(net.parameters()) - start)).view(5, 3)
    torch.testing.assert_close(instrument.changes.optimizer, expected)


def test_batch_statistics_are_those_of_the_moment():
    """In evaluation the statistics after the batch count, on both sides of the step."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    optimizer = SGD(net.parameters(), 1e-5)
    trained(net, optimizer, steps=0)
    for mode in ("eval", "train"):
        instrument = PredictionInstrument(mode=mode)
        instrument.start(probe())
        twin, other = copy.deepcopy((net, optimizer))
        for mine, his in zip(twin.parameters(), net.parameters(), strict=True):
            mine.grad = his.grad.clone()
        instrument.predict(twin, other, 1)
        buffers = copy.deepcopy(dict(twin.named_buffers()))
        other.step()
        found = instrument.measure(twin, 1).scalars
        assert found["prediction/explained"] > 0.99
        assert found["prediction/output_cosine"] > 0.9999
        assert twin.training
        for name, buffer in twin.named_buffers():
            assert torch.equal(buffer, buffers[name])


def test_nothing_of_model_and_optimizer_changes():
    net, twin = network(), network()
    optimizers = [Adam(n.parameters(), 0.01, amsgrad=True) for n in (net, twin)]
    instrument = PredictionInstrument()
    instrument.start(probe())
    for step in range(1, 4):
        for model, optimizer in zip((net, twin), optimizers, strict=True):
            optimizer.zero_grad()
            x, y = batch(step)
            cross_entropy(model(x), y).backward()
        generators = torch.get_rng_state()
        instrument.predict(net, optimizers[0], step)
        for optimizer in optimizers:
            optimizer.step()
        instrument.measure(net, step)
        assert torch.equal(generators, torch.get_rng_state())
        for mine, his in zip(net.parameters(), twin.parameters(), strict=True):
            assert torch.equal(mine, his)
            assert torch.equal(mine.grad, his.grad)
    left, right = (optimizer.state_dict() for optimizer in optimizers)
    torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_float32_weights():
    net = network().float()
    optimizer = AdamW(net.parameters(), 1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        x, y = batch(0)
        cross_entropy(net(x.float()), y).backward()
        optimizer.step()
    instrument = PredictionInstrument()
    instrument.start(probe())
    instrument.predict(net, optimizer, 3)
    optimizer.step()
    found = instrument.measure(net, 3).scalars
    assert found["prediction/step_error"] == 0.0
    assert found["prediction/explained"] > 0.95
    assert instrument.changes.actual.dtype == torch.float64

"""Predicted steps against the steps that follow, bit for bit and without a trace."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ntk_callbacks.dynamics import clipped_gradients, predicted_step


class Noisy(torch.optim.Optimizer):
    """Draws random numbers, and keeps what no optimizer of torch would pickle."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
        self.scale = 0.1
        self.history = []

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * (p.grad + self.scale * torch.randn_like(p))
        self.history.append(len(self.history))


class Lookahead(torch.optim.Optimizer):
    """Steps another optimizer, and goes back half of the way at every second step."""

    def __init__(self, optimizer):
        # As found in the wild: without Optimizer.__init__.
        self.optimizer, self.steps = optimizer, 0
        self.param_groups, self.state = optimizer.param_groups, optimizer.state
        self.slow = [p.detach().clone() for p in self._parameters()]

    def _parameters(self):
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self):
        self.optimizer.step()
        self.steps += 1
        if self.steps % 2 == 0:
            for p, slow in zip(self._parameters(), self.slow, strict=True):
                p.copy_(slow.lerp_(p, 0.5))

    def state_dict(self):
        return {
            "inner": self.optimizer.state_dict(),
            "steps": self.steps,
            "slow": [*self.slow],
        }


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "dampening": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.3),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "decay": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "maximize": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, maximize=True),
    "sgd_foreach": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=True),
    "sgd_fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "adam_decay": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True, maximize=True),
    "adam_foreach": lambda p: torch.optim.Adam(p, 0.01, foreach=True),
    "adam_fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "adam_tensor_rate": lambda p: torch.optim.Adam(p, torch.tensor(0.01)),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "adamw_amsgrad": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01, lr_decay=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, 0.01),
    "noisy": lambda p: Noisy(p, 0.01),
    "lookahead": lambda p: Lookahead(torch.optim.Adam(p, 0.01)),
    "lookahead_noisy": lambda p: Lookahead(Noisy(p, 0.01)),
}


def network():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def backward(net):
    net.zero_grad()
    net(torch.randn(4, 3, dtype=torch.float64)).square().sum().backward()


def everything(net, optimizer):
    """What a prediction could have changed, copied."""
    return copy.deepcopy(
        {
            "params": [p.data for p in net.parameters()],
            "grads": [p.grad for p in net.parameters()],
            "state": optimizer.state_dict(),
            "history": getattr(optimizer, "history", None),
            "rng": torch.get_rng_state(),
        }
    )


def assert_same(first, second):
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first == second


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_next_step_bit_for_bit_and_without_a_trace(name):
    net = network()
    optimizer = OPTIMIZERS[name](net.parameters())
    for _ in range(4):
        backward(net)
        before = everything(net, optimizer)
        found = predicted_step(optimizer, net)
        assert_same(everything(net, optimizer), before)
        optimizer.step()
        moved = {
            n: p.data - old
            for (n, p), old in zip(
                net.named_parameters(), before["params"], strict=True
            )
        }
        assert found.keys() == moved.keys()
        for key in found:
            assert torch.equal(found[key], moved[key])
            assert moved[key].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_the_precision_of_the_parameters(dtype):
    net = nn.Linear(3, 2).to(dtype)
    optimizer = torch.optim.AdamW(net.parameters(), 0.01)
    net(torch.randn(4, 3, dtype=dtype)).square().sum().backward()
    start = net.weight.detach().clone()
    found = predicted_step(optimizer, net)["weight"]
    optimizer.step()
    assert found.dtype == dtype
    assert torch.equal(found, net.weight.detach() - start)


def test_written_out_for_momentum_and_adam():
    """The formulas, so that not everything rests on torch itself."""
    net = nn.Linear(1, 1, bias=False).double()
    g = [2.0, -1.0, 0.5]
    sgd = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, dampening=0.25)
    adam = torch.optim.Adam(net.parameters(), 0.1, betas=(0.8, 0.9), eps=0.01)
    buffer = m = v = 0.0
    for step, gradient in enumerate(g, start=1):
        grads = {"weight": torch.full((1, 1), gradient, dtype=torch.float64)}
        buffer = gradient if step == 1 else 0.9 * buffer + 0.75 * gradient
        m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
        expected = -0.1 * m / (1 - 0.8**step) / ((v / (1 - 0.9**step)) ** 0.5 + 0.01)
        for optimizer, value in ((sgd, -0.1 * buffer), (adam, expected)):
            found = predicted_step(optimizer, net, grads)["weight"].item()
            assert found == pytest.approx(value, abs=1e-15)
            net.weight.grad = grads["weight"].clone()
            optimizer.step()


def test_groups_have_their_own_rates_and_schedulers_are_heard():
    net = network()
    groups = [
        {"params": net[0].parameters(), "lr": 0.1},
        {"params": net[2].parameters(), "lr": 0.01, "momentum": 0.5},
    ]
    optimizer = torch.optim.SGD(groups)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    for _ in range(2):
        backward(net)
        start = [p.detach().clone() for p in net.parameters()]
        found = predicted_step(optimizer, net)
        optimizer.step()
        for step, p, old in zip(found.values(), net.parameters(), start, strict=True):
            assert torch.equal(step, p.detach() - old)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)


def test_what_has_no_gradient_or_no_optimizer_stands_still():
    net = network()
    optimizer = torch.optim.AdamW(net[2].parameters(), 0.1, weight_decay=0.5)
    gradients = {"2.bias": torch.ones(2, dtype=torch.float64)}
    found = predicted_step(optimizer, net, gradients)
    assert list(found) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    for name in ("0.weight", "0.bias", "2.weight"):
        assert not found[name].any()
    assert found["2.bias"].all()
    assert list(predicted_step(optimizer, net, gradients, parameters="2")) == [
        "2.weight",
        "2.bias",
    ]


def test_hooks_are_not_run():
    net, calls = network(), []
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    optimizer.register_step_pre_hook(lambda *_: calls.append("own"))
    handle = register_optimizer_step_pre_hook(lambda *_: calls.append("global"))
    try:
        backward(net)
        predicted_step(optimizer, net)
        assert calls == []
        optimizer.step()
        assert sorted(calls) == ["global", "own"]
    finally:
        handle.remove()


def test_the_class_of_a_wrapper_stays_as_it_was():
    net = network()
    optimizer = Lookahead(torch.optim.SGD(net.parameters(), 0.1))
    step = Lookahead.step
    backward(net)
    predicted_step(optimizer, net)
    assert Lookahead.step is step
    optimizer.step()


def test_a_schedule_of_the_optimizer_within_a_wrapper_is_heard_and_left_alone():
    net = network()
    inner = torch.optim.SGD(net.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.StepLR(inner, 1, gamma=0.5)
    optimizer = Lookahead(inner)
    backward(net)
    optimizer.step()
    schedule.step()
    backward(net)
    before = everything(net, optimizer)
    found = predicted_step(optimizer, net)
    assert_same(everything(net, optimizer), before)
    start = [p.detach().clone() for p in net.parameters()]
    optimizer.step()
    for step, p, old in zip(found.values(), net.parameters(), start, strict=True):
        assert torch.equal(step, p.detach() - old)


def test_sparse_gradients():
    net = nn.Embedding(5, 2, sparse=True).double()
    optimizer = torch.optim.SparseAdam(net.parameters(), 0.1)
    net(torch.tensor([1, 3])).square().sum().backward()
    start = net.weight.detach().clone()
    found = predicted_step(optimizer, net)["weight"]
    optimizer.step()
    assert torch.equal(found, net.weight.detach() - start)


def test_tied_parameters_move_once():
    net = nn.Sequential(nn.Linear(2, 2, False), nn.Linear(2, 2, False)).double()
    net[1].weight = net[0].weight
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net(torch.ones(1, 2).double()).sum().backward()
    found = predicted_step(optimizer, net)
    assert list(found) == ["0.weight"]
    assert torch.allclose(found["0.weight"], -0.1 * net[0].weight.grad)


@pytest.mark.parametrize("limit", [0.1, 1e6])
def test_clipping_is_that_of_torch(limit):
    net = network()
    backward(net)
    gradients = {name: p.grad.clone() for name, p in net.named_parameters()}
    by_norm = clipped_gradients(gradients, max_norm=limit)
    by_value = clipped_gradients(gradients, max_value=limit)
    for name, p in net.named_parameters():
        assert torch.equal(p.grad, gradients[name])
    nn.utils.clip_grad_norm_(net.parameters(), limit)
    for name, p in net.named_parameters():
        assert torch.allclose(p.grad, by_norm[name], rtol=1e-14, atol=0)
        p.grad = gradients[name].clone()
    nn.utils.clip_grad_value_(net.parameters(), limit)
    for name, p in net.named_parameters():
        assert torch.equal(p.grad, by_value[name])
    assert clipped_gradients({}, max_norm=1.0) == {}


# Bad input.


def test_optimizers_that_evaluate_the_loss_are_refused():
    net = network()
    backward(net)
    lbfgs = torch.optim.LBFGS(net.parameters())
    with pytest.raises(ValueError, match="LBFGS evaluates the loss during its step"):
        predicted_step(lbfgs, net)


class Sharpness(torch.optim.SGD):
    """Wants a closure, and says so only when it steps."""

    def step(self, closure=None):
        if closure is None:
            raise RuntimeError("a closure, please")


def test_a_step_that_fails_says_why():
    net = network()
    backward(net)
    with pytest.raises(ValueError, match="cannot step: a closure, please"):
        predicted_step(Sharpness(net.parameters(), 0.1), net)


def test_what_cannot_be_copied_says_why():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    optimizer.source = (number for number in range(3))
    with pytest.raises(ValueError, match="SGD cannot be copied"):
        predicted_step(optimizer, net, {})


def test_arguments_that_do_not_belong_together():
    net, other = network(), network()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with pytest.raises(ValueError, match="holds no parameter of this Sequential"):
        predicted_step(optimizer, other)
    with pytest.raises(ValueError, match="no such parameter"):
        predicted_step(optimizer, net, {"weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"shape \(1,\); expected \(5, 3\)"):
        predicted_step(optimizer, net, {"0.weight": torch.ones(1)})
    for limits in ({}, {"max_norm": 1.0, "max_value": 1.0}, {"max_norm": 0.0}):
        with pytest.raises(ValueError, match="expected one of them"):
            clipped_gradients({}, **limits)

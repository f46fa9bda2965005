"""Settings, modes, hooks and copies around a monitor: neither side notices it."""

import copy
import gc
import pickle
import warnings
import weakref
from functools import partialmethod

import pytest
import torch
from delicate import delicate_run
from lightning.pytorch import Callback
from monitored import MONITORS, Plain, all_monitors, fit, same, seeded
from torch import nn
from torch.utils.checkpoint import checkpoint

from ntk_callbacks import JacobianMonitor, NTKMonitor


@pytest.fixture
def unusual_settings():
    """What a user may have chosen for the whole process."""
    torch.set_float32_matmul_precision("high")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = True
    yield
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False


@pytest.mark.parametrize("chosen", [None, "unusual_settings"])
def test_global_settings_and_warning_filters_stay(chosen, request):
    """Mode 35: process-wide flags are those of a run without monitors."""
    if chosen:
        request.getfixturevalue(chosen)

    def settings():
        backends = torch.backends
        return {
            "dtype": torch.get_default_dtype(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "precision": torch.get_float32_matmul_precision(),
            "tf32": [
                operator.fp32_precision
                for operator in (backends.mkldnn.matmul, backends.cudnn.conv)
            ],
            "benchmark": backends.cudnn.benchmark,
            "threads": torch.get_num_threads(),
            "grad": torch.is_grad_enabled(),
            "anomaly": torch.is_anomaly_enabled(),
            "filters": list(warnings.filters),
        }

    class Look(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_start(self, *_):
            self.seen.append(settings())

        def on_train_end(self, *_):
            self.seen.append(settings())

    with_monitors, without = Look(), Look()
    run = delicate_run([*all_monitors(every=2), with_monitors])
    delicate_run([without])
    assert run.recorder.measured()
    assert with_monitors.seen == without.seen
    assert {seen["precision"] for seen in with_monitors.seen} == {
        "high" if chosen else "highest"
    }


def test_no_tensor_stays_behind_from_one_measurement_to_the_next():
    """Mode 28: kernels that are kept hold no graph, and nothing piles up."""
    earlier = {}
    newer = []

    class Count(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step not in (3, 7, 11):
                return
            gc.collect()
            # Each tensor's type is asked first: some objects cannot even be compared.
            alive = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
            if earlier:
                newer.append(
                    sum(earlier.get(id(t), lambda: None)() is not t for t in alive)
                )
            else:
                earlier.update((id(t), weakref.ref(t)) for t in alive)

    monitors = all_monitors(every=1)
    fit(Plain(), [*monitors, Count()], max_steps=12)
    assert len(earlier) > 20
    assert newer[0] == newer[1]  # those of step 3 that were replaced, and no more
    kept = []
    for monitor in monitors:
        collect(monitor.state_dict(), kept)
    assert len(kept) >= 2 + 2 * 4  # two kernels, the weights twice
    assert not any(t.requires_grad or t.grad_fn or t.is_inference() for t in kept)


def collect(state, found):
    if isinstance(state, torch.Tensor):
        found.append(state)
    elif isinstance(state, dict):
        for value in state.values():
            collect(value, found)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda monitor: pickle.loads(pickle.dumps(monitor)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize(
    ("name", "every"),
    [
        *((name, 2) for name in MONITORS),
        *(("drift", every) for every in ("epoch", "2 per decade", "at 1 3")),
    ],
)
def test_monitors_can_be_copied_before_and_after_use(how, name, every):
    """Mode 22: spawned processes, joblib launchers and weight averaging copy them."""
    monitor = COPIES[how](MONITORS[name](every, 4))
    seeded()
    first = fit(Plain(), monitor, max_epochs=1).recorder.measured()
    again = COPIES[how](monitor)
    same(again.history, monitor.history)
    assert again.state_key == monitor.state_key
    same(again.state_dict(), monitor.state_dict())
    seeded()
    same(fit(Plain(), again, max_epochs=1).recorder.measured(), first)


class Ambient(Callback):
    """Calls hooks of monitors the way other code might: without gradients."""

    def __init__(self, monitors, context):
        self.monitors, self.context = monitors, context

    def tell(self, *args, hook):
        with self.context():
            for monitor in self.monitors:
                getattr(monitor, hook)(*args)


for _hook in (
    *("on_train_start", "on_train_batch_start", "on_before_backward"),
    *("on_after_backward", "on_before_optimizer_step", "on_train_batch_end"),
    *("on_train_epoch_end", "on_train_end"),
):
    setattr(Ambient, _hook, partialmethod(Ambient.tell, hook=_hook))


@pytest.mark.parametrize(
    "context",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
    ],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_surrounding_modes_do_not_reach_the_measurement(context):
    """Modes 24 and 25: gradients off, inference tensors as references, autocast."""
    seeded()
    plain = fit(Plain(), all_monitors(1), max_steps=3)
    seeded()
    inside = fit(Plain(), Ambient(all_monitors(1), context), max_steps=3)
    assert [*plain.recorder.measured()] == [0, 1, 2, 3]
    same(inside.recorder.measured(), plain.recorder.measured())
    same(inside.trace(), plain.trace())


def test_users_forward_hooks_may_run_but_leave_no_trace():
    """Mode 34: hooks that count, call `.item()` and keep tensors see a measurement."""

    class Hooked(Plain):
        def __init__(self):
            super().__init__()
            self.calls = 0
            self.means = []
            self.register_buffer("total", torch.zeros(()))
            self.net[0].register_forward_hook(self.look)

        def look(self, module, inputs, output):
            self.calls += 1
            self.means.append(output.mean().item())
            self.total += output.detach().mean()

    def run(callbacks):
        seeded()
        return fit(Hooked(), callbacks, max_steps=4)

    monitored, bare = run(all_monitors(every=1)), run([])
    assert [*monitored.recorder.measured()] == [0, 1, 2, 3, 4]
    same(monitored.trace(), bare.trace())
    assert monitored.model.calls == bare.model.calls == 4
    assert monitored.model.means == bare.model.means


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.reentrant = reentrant

    def forward(self, x):
        h = checkpoint(self.first, x, use_reentrant=self.reentrant)
        return self.last(torch.tanh(Doubled.apply(h)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_models_that_torch_func_cannot_differentiate(reentrant):
    """Mode 31: activation checkpointing and autograd functions of the old style."""

    def run(callbacks):
        seeded()
        model = Plain(Checkpointed(reentrant))
        if reentrant:  # needs an input that asks for gradients
            model.forward = lambda x: model.net(x.requires_grad_())
        return fit(model, callbacks, max_steps=3)

    monitors = [NTKMonitor(4, 1, on_error="raise"), MONITORS["drift"](1, 4)]
    if not reentrant:
        monitors.append(JacobianMonitor(4, 1, on_error="raise"))
    monitored = run(monitors)
    assert [*monitored.recorder.measured()] == [0, 1, 2, 3]
    same(monitored.trace(), run([]).trace())

"""Training with monitors is training without them, to the last bit."""

import copy
import gc
import pickle
import random
import warnings
import weakref
from functools import cache, partialmethod

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from monitored import (
    MONITORS,
    Delicate,
    Plain,
    all_monitors,
    copied,
    fit,
    generator_states,
    loader,
    same,
    seeded,
)
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from ntk_callbacks import (
    FeatureMonitor,
    JacobianMonitor,
    LinearizationMonitor,
    LinearizationOptions,
    NTKMonitor,
    NTKOptions,
    PredictionMonitor,
    SignalMonitor,
)

DELICATE = {"accumulate_grad_batches": 2, "max_epochs": 3}


def delicate_run(callbacks=(), **settings):
    seeded()
    return fit(
        Delicate(),
        callbacks,
        train=loader(15, shuffle=True, drop_last=False),
        val=loader(6),
        **(DELICATE | settings),
    )


class HalfWay(Callback):
    """Looks at what is only there between two updates."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        gradients = [p.grad for p in pl_module.parameters()]
        self.seen.append((copied(gradients), generator_states()))


def test_nothing_of_a_delicate_run_changes():
    """Modes 1-8: chance, training flags, frozen layers, buffers, gradients that are
    half accumulated, the order of a shuffled loader."""
    watch, watch_bare = HalfWay(), HalfWay()
    monitored = delicate_run([*all_monitors(every=1), watch])
    bare = delicate_run([watch_bare])
    assert [*monitored.recorder.measured()] == [*range(10)]  # 3 epochs of 5 batches
    same(monitored.trace(), bare.trace())
    same(watch.seen, watch_bare.seen)
    assert any(g is not None for gradients, _ in watch.seen for g in gradients)


@pytest.mark.parametrize("name", MONITORS)
def test_each_monitor_alone_changes_nothing(name):
    monitored = delicate_run(MONITORS[name]("epoch", 4))
    assert [*monitored.recorder.measured()] == [0, 3, 6, 9]
    same(monitored.trace(), bare_trace())


@cache
def bare_trace():
    return delicate_run().trace()


def test_train_mode_kernel_moves_no_statistics():
    """Modes 2 and 4: BatchNorm on batch statistics, measured as it trains."""
    train = LinearizationOptions(mode="train")
    monitors = [
        NTKMonitor(4, 1, options=NTKOptions(mode="train"), on_error="raise"),
        JacobianMonitor(4, 1, mode="train", on_error="raise"),
        PredictionMonitor(4, 1, mode="train", on_error="raise"),
        SignalMonitor(4, 1, mode="train", on_error="raise"),
        FeatureMonitor(4, 1, mode="train", on_error="raise"),
        LinearizationMonitor(4, 1, twin=True, options=train, on_error="raise"),
    ]
    monitored = delicate_run(monitors)
    assert len(monitored.recorder.measured()) == 10
    same(monitored.trace(), bare_trace())


def test_layer_frozen_in_on_train_start_stays_frozen():
    """Mode 2: `train()` after a measurement must not wake what a user put to sleep."""

    class Frozen(Delicate):
        def train(self, mode=True):
            return nn.Module.train(self, mode)

        def on_train_start(self):
            self.net[5].eval()

    def run(callbacks):
        seeded()
        return fit(Frozen(), callbacks, val=loader(6), max_epochs=2)

    monitored = run(all_monitors(every=1))
    same(monitored.trace(), run([]).trace())
    assert not monitored.model.net[5].training
    assert monitored.model.net[1].training


class Vandal:
    """An `output_fn` that breaks what it can reach, then raises at its second call."""

    def __init__(self):
        self.calls = 0

    def meet(self, model):
        """Past the copies that a measurement works on."""
        self.model = model
        self.parameters = [*model.parameters()]
        self.buffers = [*model.buffers()]

    def __call__(self, module, x):
        self.calls += 1
        if self.calls != 2:
            return module(x)
        real = self.model
        real.net.train()
        real.net[5].train()
        for buffer in self.buffers:
            buffer.add_(1)
        with torch.enable_grad():
            sum(parameter.sum() for parameter in self.parameters).backward()
        self.parameters[-1].grad = torch.full_like(self.parameters[-1], 9.0)
        for parameter in self.parameters:
            parameter.data.mul_(2)
        self.parameters[0].data = torch.zeros(4, 3)
        self.parameters[0].requires_grad_(False)
        real.net[0].extra = 1
        real.net[0].register_forward_hook(lambda *_: None)
        real.net.append(nn.Linear(2, 2))
        random.random()
        np.random.rand()  # noqa: NPY002
        torch.rand(5)
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True)
        torch.set_float32_matmul_precision("medium")
        raise RuntimeError("the vandal was here")


class Acquaint(Callback):
    def __init__(self, vandal):
        self.vandal = vandal

    def on_fit_start(self, trainer, pl_module):
        self.vandal.meet(pl_module)


@pytest.mark.parametrize("kind", [NTKMonitor, JacobianMonitor])
@pytest.mark.parametrize("first", [0, 3], ids=["at the start", "mid-accumulation"])
def test_failed_measurement_changes_nothing(kind, first):
    """Modes 3, 20, 21: an exception halfway through a measurement."""
    vandal = Vandal()
    vandal.calls = 0 if first == 0 else -100
    monitor = kind(4, every=1, output_fn=vandal)

    class Later(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == first:
                vandal.calls = 0

    callbacks = [Acquaint(vandal), monitor]
    with pytest.warns(UserWarning, match="the vandal was here.*training goes on"):
        monitored = delicate_run([*callbacks, *([Later()] if first else [])])
    same(monitored.trace(), bare_trace())
    skipped = {0: 0, 3: 4}[first]
    assert [*monitored.recorder.measured()] == [s for s in range(10) if s != skipped]
    assert not hasattr(monitored.model.net[0], "extra")
    assert not monitored.model.net[0]._forward_hooks
    assert torch.get_default_dtype() == torch.float32
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_float32_matmul_precision() == "highest"


def test_module_keeps_its_keys_attributes_and_hooks():
    """Modes 21 and 23: nothing is left on the module, nothing in its state."""
    model = Delicate()
    keys = [*model.state_dict()]
    attributes = {name: {*vars(part)} for name, part in model.named_modules()}
    hooks = [name for name in vars(model) if name.endswith("_hooks")]
    assert len(hooks) > 5
    run = fit(model, all_monitors(every=1), val=loader(6))
    assert run.recorder.measured()
    assert [*model.state_dict()] == keys
    bare = Delicate()
    fit(bare, val=loader(6))
    for (name, part), plain in zip(model.named_modules(), bare.modules(), strict=True):
        assert {*vars(part)} == {*vars(plain)}, name
        assert {*vars(part)} >= attributes[name]
        for hook in hooks:
            assert len(getattr(part, hook)) == len(getattr(plain, hook)), (name, hook)


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


def test_probe_with_an_augmenting_dataset_draws_no_random_number():
    """Modes 6-8: the examples are transformed with the global generators."""

    class Augmented(torch.utils.data.Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, index):
            noise = torch.randn(3) + random.random() + float(np.random.rand())  # noqa: NPY002
            return noise, index % 2

    def run(callbacks):
        seeded()
        data = torch.utils.data.DataLoader(Augmented(), batch_size=3, shuffle=True)
        return fit(Plain(), callbacks, train=data)

    monitored = run(all_monitors("epoch", probe=6))
    assert [*monitored.recorder.measured()] == [0, 4, 8]
    same(monitored.trace(), run([]).trace())


def test_iterable_dataset_gives_its_first_examples_to_the_training_too():
    """Mode 6: drawing a probe from a stream consumes nothing of it."""

    class Stream(torch.utils.data.IterableDataset):
        def __init__(self):
            self.source = iter(range(100))

        def __iter__(self):
            for index in self.source:
                if index == 24:
                    return
                yield torch.full((3,), float(index)), index % 2

    def run(callbacks):
        seeded()
        data = torch.utils.data.DataLoader(Stream(), batch_size=3)
        return fit(Plain(), callbacks, train=data, max_epochs=1)

    bare = run([])
    assert bare.trainer.global_step == 8
    with warnings.catch_warnings():
        monitored = run(all_monitors(4))
    same(monitored.trace(), bare.trace())


def test_unused_and_frozen_parameters_keep_their_missing_gradients():
    """Mode 5: `.grad` of what the loss does not use stays None."""

    class Spare(Plain):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(2, 2)
            self.net[0].bias.requires_grad_(False)

    run = fit(Spare(), all_monitors(every=1), max_steps=3)
    assert len(run.recorder.measured()) == 4
    assert run.model.spare.weight.grad is None
    assert run.model.net[0].bias.grad is None
    assert not run.model.net[0].bias.requires_grad


def test_graph_that_the_user_holds_over_an_update_stays_valid():
    """A loss of the last batch, differentiated in the next one."""

    class Holding(Plain):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.held = None

        def training_step(self, batch, batch_idx):
            x, y = batch
            if self.held is not None:
                self.held.backward()
                self.optimizers().step()
                self.optimizers().zero_grad()
            self.held = cross_entropy(self(x), y)

    def run(callbacks):
        seeded()
        return fit(Holding(), callbacks, max_epochs=2)

    monitored = run(all_monitors(every=1, twin=False))
    assert len(monitored.recorder.measured()) > 3
    same(copied(monitored.model.state_dict()), copied(run([]).model.state_dict()))


def test_public_docstring_names_every_tag_that_is_logged():
    run = fit(Plain(), all_monitors("epoch"), max_epochs=1)
    tags = {tag for row in run.recorder.measured().values() for tag in row}
    kinds = {type(monitor) for monitor in all_monitors()}
    text = " ".join(kind.__doc__ for kind in kinds)
    for tag in tags:
        known = "params_tensors/displacement/" if "_tensors" in tag else tag
        assert known in text, tag


def test_no_tag_begins_another_tag():
    # MLflow's file store keeps metrics as files and cannot hold both.
    run = fit(Plain(), all_monitors("epoch"), max_epochs=1)
    tags = {tag for row in run.recorder.measured().values() for tag in row}
    assert not [(a, b) for a in tags for b in tags if b.startswith(f"{a}/")]

"""SignalMonitor in real runs: nothing changes, nothing is lost, failures are said."""

import pickle

import pytest
import torch
from lightning.pytorch import Callback
from monitored import (
    Delicate,
    Plain,
    copied,
    fit,
    generator_states,
    loader,
    same,
    seeded,
)
from torch import nn

from ntk_callbacks import SignalMonitor
from ntk_callbacks.instruments.signal import SignalInstrument
from ntk_callbacks.probe import Probe

DELICATE = {"accumulate_grad_batches": 2, "max_epochs": 3}


class HalfWay(Callback):
    """Gradients and generators between two updates."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        gradients = [p.grad for p in pl_module.parameters()]
        hooks = [len(m._forward_hooks) for m in pl_module.modules()]
        self.seen.append((copied(gradients), generator_states(), hooks))


def run(kind, callbacks=(), **settings):
    seeded()
    return fit(kind(), list(callbacks), **settings)


def delicate(callbacks=(), **settings):
    watch = HalfWay()
    done = run(
        Delicate,
        [*callbacks, watch],
        train=loader(15, shuffle=True, drop_last=False),
        val=loader(6),
        **(DELICATE | settings),
    )
    return done, watch.seen


@pytest.mark.parametrize("every", [1, "epoch"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"mode": "train"}, {"gradient_of": "loss", "per_layer": True}],
    ids=["eval", "train", "loss"],
)
def test_training_is_the_same_to_the_last_bit(every, settings):
    monitor = SignalMonitor(4, every, on_error="raise", **settings)
    monitored, seen = delicate([monitor])
    bare, seen_bare = delicate()
    steps = range(10) if every == 1 else [0, 3, 6, 9]
    assert [*monitored.recorder.measured()] == [*steps]
    same(monitored.trace(), bare.trace())
    same(seen, seen_bare)


def test_logged_is_what_the_instrument_measures():
    """Weights of the last step, a probe of one's own, and the tags of a small net."""
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    done = run(Plain, [SignalMonitor(x, 4, on_error="raise")])
    measured = done.recorder.measured()
    assert [*measured] == [0, 4, 8]
    instrument = SignalInstrument()
    instrument.start(Probe(x))
    expected = instrument.measure(done.model, 8).scalars
    assert {"signal/q_first", "signal/chi", "signal/q_mean_field_error"} <= {*expected}
    same(measured[8], expected)
    h = done.model.net[0](x).detach().double()
    assert measured[8]["signal/q_first"] == pytest.approx(float(h.square().mean()))


def test_state_keys_tell_monitors_apart():
    keys = {
        SignalMonitor(**settings).state_key
        for settings in (
            {},
            {"every": 3},
            {"layers": "net"},
            {"mode": "train"},
            {"gradient_of": "loss"},
            {"name": "signal_2"},
        )
    }
    assert len(keys) == 6
    assert SignalMonitor().state_key == SignalMonitor().state_key


def test_monitors_are_pickled_before_and_after_a_run():
    monitor = pickle.loads(pickle.dumps(SignalMonitor(4, 4, layers=nn.Linear)))
    done = run(Plain, [monitor])
    assert [*done.recorder.measured()] == [0, 4, 8]
    same(pickle.loads(pickle.dumps(monitor)).history, monitor.history)


def test_two_of_one_name_are_refused_and_two_names_are_not():
    with pytest.raises(ValueError, match="another monitor writes to the tags"):
        run(Plain, [SignalMonitor(4), SignalMonitor(4, mode="train")])
    other = SignalMonitor(4, 4, name="signal/train", mode="train", on_error="raise")
    done = run(Plain, [SignalMonitor(4, 4, on_error="raise"), other], max_epochs=1)
    tags = {tag for _, row in done.recorder.rows for tag in row}
    assert {"signal/chi", "signal/train/chi"} <= tags


class Recurrent(Plain):
    """A recurrent network: no linear layer is called before the last one."""

    def __init__(self):
        super().__init__(nn.GRU(3, 2, batch_first=True))

    def forward(self, x):
        return self.net(x[:, None])[0][:, 0]


@pytest.mark.parametrize(
    ("model", "settings", "what"),
    [
        (Recurrent, {}, r"net \(GRU\).*layers=nn\.GRU"),
        (Plain, {"layers": "conv"}, r"layers='conv'.*net\.0 \(Linear\)"),
        (
            Plain,
            {"probe": torch.zeros(2, 3), "gradient_of": "loss"},
            "needs targets.*Probe",
        ),
    ],
)
def test_what_cannot_be_measured_warns_and_training_goes_on(model, settings, what):
    settings = {"probe": 4} | settings
    with pytest.warns(UserWarning, match=what):
        done = run(model, [SignalMonitor(every=1, **settings)])
    assert not done.recorder.measured()
    same(done.trace(), run(model).trace())
    with pytest.raises((RuntimeError, ValueError), match=what):
        run(model, [SignalMonitor(every=1, on_error="raise", **settings)])


def test_recurrent_layers_on_request():
    monitor = SignalMonitor(4, 4, layers=nn.GRU, on_error="raise")
    assert [*run(Recurrent, [monitor]).recorder.measured()] == [0, 4, 8]


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_other_precisions(precision):
    monitors = [SignalMonitor(4, 4, on_error="raise")]
    with_monitor = run(Plain, monitors, precision=precision)
    measured = with_monitor.recorder.measured()
    assert [*measured] == [0, 4, 8]
    assert 0 < measured[8]["signal/q_first"] < 100
    same(with_monitor.trace(), run(Plain, precision=precision).trace())

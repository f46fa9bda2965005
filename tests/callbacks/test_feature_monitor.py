"""FeatureMonitor in real runs: nothing changes, nothing is lost, failures are said."""

import pickle

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from monitored import (
    Delicate,
    Plain,
    Recorder,
    copied,
    fit,
    generator_states,
    loader,
    same,
    seeded,
)
from torch import nn

from ntk_callbacks import FeatureMonitor
from ntk_callbacks.instruments.features import FeatureInstrument
from ntk_callbacks.probe import Probe


def measured(run):
    """Step -> the numbers of the features."""
    found = {}
    for step, row in run.recorder.rows:
        for tag, value in row.items():
            if tag.startswith("features"):
                assert tag not in found.setdefault(step, {})
                found[step][tag] = value
    return found


class Gated(Plain):
    """A small ReLU network."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)))


class HalfWay(Callback):
    """Gradients, generators and hooks between two updates."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        gradients = [p.grad for p in pl_module.parameters()]
        hooks = [len(m._forward_hooks) for m in pl_module.modules()]
        before = [len(m._forward_pre_hooks) for m in pl_module.modules()]
        self.seen.append((copied(gradients), generator_states(), hooks, before))


def run(kind, callbacks=(), **settings):
    seeded()
    return fit(kind(), list(callbacks), **settings)


def delicate(callbacks=()):
    watch = HalfWay()
    done = run(
        Delicate,
        [*callbacks, watch],
        train=loader(15, shuffle=True),
        val=loader(6),
        accumulate_grad_batches=2,
        max_epochs=3,
    )
    rows = [(s, r) for s, r in done.recorder.trained() if not is_measured(r)]
    return done, done.trace() | {"logged": rows}, watch.seen


def is_measured(row):
    return any(tag.startswith("features") for tag in row)


@pytest.mark.parametrize("every", [1, "epoch"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_training_is_the_same_to_the_last_bit(every, mode):
    monitor = FeatureMonitor(4, every, mode=mode, per_layer=True, on_error="raise")
    done, trace, seen = delicate([monitor])
    _, bare, seen_bare = delicate()
    steps = range(10) if every == 1 else [0, 3, 6, 9]
    assert [*measured(done)] == [*steps]
    assert {len(row) for row in measured(done).values()} == {10}
    same(trace, bare)
    same(seen, seen_bare)


def test_logged_is_what_the_instrument_measures():
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    done = run(Gated, [FeatureMonitor(Probe(x, torch.arange(5) % 2), 4)])
    rows = measured(done)
    assert [*rows] == [0, 4, 8]
    assert len(rows[0]) == 8
    instrument = FeatureInstrument()
    instrument.start(Probe(x, torch.arange(5) % 2))
    expected = instrument.measure(done.model, 8).scalars
    for tag in ("target_alignment", "participation_ratio", "entropy_rank"):
        assert rows[8][f"features/{tag}"] == expected[f"features/{tag}"]
    assert (
        rows[8]["features/relative_change"] > 0 == rows[0]["features/relative_change"]
    )
    assert rows[8]["features/pattern_change"] > 0 == rows[0]["features/pattern_change"]


# The resumed run has no ModelCheckpoint.
@pytest.mark.filterwarnings("ignore:Be aware.*add the following.*ModelCheckpoint")
@pytest.mark.parametrize("stop", [2, 5])
def test_a_resumed_run_draws_the_curves_of_an_unbroken_one(stop, tmp_path):
    def monitor():
        return FeatureMonitor(4, 2, per_layer=True, on_error="raise")

    data = {"train": loader(12, batch_size=12), "max_steps": 8}  # a step an epoch
    unbroken = run(Gated, [monitor()], **data)
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    short = run(
        Gated,
        [monitor(), saver],
        enable_checkpointing=True,
        **(data | {"max_steps": stop}),
    )
    (path,) = tmp_path.glob(f"*step={stop}.ckpt")
    rest = run(Gated, [monitor()], ckpt_path=str(path), **data)
    expected, before, after = measured(unbroken), measured(short), measured(rest)
    assert [*expected] == [0, 2, 4, 6, 8]
    for step, row in expected.items():
        same(after[step] if step > stop else before[step], row, str(step))


def test_state_keys_tell_monitors_apart():
    keys = {
        FeatureMonitor(**settings).state_key
        for settings in (
            {},
            {"every": 3},
            {"layer": "net.0"},
            {"mode": "train"},
            {"patterns": False},
            {"name": "features_2"},
        )
    }
    assert len(keys) == 6
    assert FeatureMonitor().state_key == FeatureMonitor().state_key


def test_monitors_are_pickled_before_and_after_a_run():
    monitor = pickle.loads(pickle.dumps(FeatureMonitor(4, 4, layer="net.1")))
    assert [*measured(run(Gated, [monitor]))] == [0, 4, 8]
    same(pickle.loads(pickle.dumps(monitor)).history, monitor.history)


def test_two_names_write_side_by_side():
    other = FeatureMonitor(4, 4, layer="net.0", name="features/first", on_error="raise")
    done = run(Gated, [FeatureMonitor(4, 4, on_error="raise"), other], max_epochs=1)
    tags = {tag for _, row in done.recorder.rows for tag in row}
    assert {"features/dead_units", "features/first/dead_units"} <= tags


def test_a_layer_that_does_not_exist_warns_and_training_goes_on():
    what = r"'fc' is no layer of Gated; it has net, net\.0, net\.1, net\.2"
    with pytest.warns(UserWarning, match=what):
        done = run(Gated, [FeatureMonitor(4, 4, layer="fc")])
    assert not measured(done)
    same(done.trace(), run(Gated).trace())
    with pytest.raises(ValueError, match=what):
        run(Gated, [FeatureMonitor(4, layer="fc", on_error="raise")])


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_other_precisions(precision):
    monitor = FeatureMonitor(4, 4, on_error="raise")
    rows = measured(run(Gated, [monitor], precision=precision))
    assert [*rows] == [0, 4, 8]
    assert rows[8]["features/relative_change"] > 0


def test_a_recorder_of_ones_own_gets_them_once():
    recorder = Recorder()
    run(Gated, [FeatureMonitor(4, 4, on_error="raise")], logger=recorder)
    assert recorder.steps("features/cka_to_init") == [0, 4, 8]

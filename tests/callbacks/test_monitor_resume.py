"""A run that was interrupted and resumed draws the curves of an unbroken one."""

import math
import random
from functools import cache

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    Checkpoint,
    ModelCheckpoint,
    OnExceptionCheckpoint,
)
from monitored import (
    PREFIXES,
    QUIET,
    Plain,
    Recorder,
    fit,
    loader,
    same,
    seeded,
)
from omegaconf import OmegaConf
from one_of_a_kind import quick
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from ntk_callbacks import (
    FeatureMonitor,
    JacobianMonitor,
    LinearizationMonitor,
    NTKMonitor,
    NTKOptions,
    ParameterDriftMonitor,
    PredictionMonitor,
    Probe,
    SignalMonitor,
)

pytestmark = [
    # Mid-epoch checkpoints are what is tested here.
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended"),
    # Lightning looks for what an OnExceptionCheckpoint saved before.
    pytest.mark.filterwarnings("ignore:.*ckpt_path=None.. was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
    # The resumed run has no ModelCheckpoint.
    pytest.mark.filterwarnings("ignore:Be aware.*add the following.*ModelCheckpoint"),
]

LAST = 12  # updates, 4 in an epoch


class Repeatable(Plain):
    """Trains on data made from the step, so that a resumed loader does not matter."""

    def __init__(self):
        super().__init__(
            nn.Sequential(
                nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)
            )
        )

    def training_step(self, batch, batch_idx):
        generator = torch.Generator().manual_seed(self.global_step)
        x = torch.randn(6, 3, generator=generator)
        loss = cross_entropy(self(x), torch.arange(6) % 2)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", cross_entropy(self(batch[0]), batch[1]))


class Fatal(Callback):
    """Ends the run in the middle of an update."""

    def __init__(self, step, error=RuntimeError):
        self.step, self.error = step, error

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            raise self.error("the power went out")


SCHEDULES = {
    1: range(LAST + 1),
    5: [0, 5, 10, LAST],
    "epoch": [0, 4, 8, LAST],
    "5 per decade": [0, 1, 2, 3, 4, 6, 10, LAST],
}


def monitors(every):
    """One of each kind in one run: their tags do not meet."""
    held_out = Probe(torch.linspace(-1, 1, 12).reshape(4, 3), torch.arange(4) % 2)
    return [
        NTKMonitor(
            *(5, every),
            by="module",
            metrics="all",
            options=NTKOptions(loss="cross_entropy_mean"),  # of labels of its own
            on_error="raise",
        ),
        ParameterDriftMonitor(every, on_error="raise"),
        JacobianMonitor(5, every, on_error="raise"),
        SignalMonitor(5, every, per_layer=True, on_error="raise"),
        FeatureMonitor(5, every, on_error="raise"),
        PredictionMonitor(5, every, on_error="raise"),
        LinearizationMonitor(5, every, held_out=held_out, on_error="raise"),
    ]


def run(callbacks, recorder=None, **settings):
    seeded()
    return fit(
        Repeatable(),
        list(callbacks),
        logger=Recorder() if recorder is None else recorder,
        enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks),
        **({"max_steps": LAST, "val": loader(3)} | settings),
    )


@cache
def unbroken(every):
    recorder = Recorder()
    run(monitors(every), recorder)
    measured = recorder.measured()
    assert [*measured] == [*SCHEDULES[every]]
    # Nothing was foretold of the start, nor had anything changed.
    later = [{*row} for step, row in measured.items() if step > 0]
    assert all({*measured[0]} <= tags == later[0] for tags in later)
    assert len(measured[0]) > 20
    return measured


@cache
def bare_weights():
    return run([]).model.state_dict()


def interrupted(every, step, saver, error=RuntimeError):
    """What a run logs that dies before the update after `step`."""
    recorder = Recorder()
    with pytest.raises((error, SystemExit)):
        run([*monitors(every), Fatal(step, error), saver], recorder)
    return recorder.measured()


def resumed(every, checkpoint, **settings):
    recorder = Recorder()
    last = run(monitors(every), recorder, ckpt_path=str(checkpoint), **settings)
    assert last.trainer.global_step == LAST
    same(last.model.state_dict(), bare_weights())
    return recorder.measured()


def check_curves(every, before, after, saved):
    """Old and new together are the unbroken curve; nothing is measured twice."""
    expected = unbroken(every)
    assert [*after] == [step for step in expected if step > saved]
    for rows in (before, after):
        for step, row in rows.items():
            same(row, expected[step], f"step {step}")


SAVERS = {
    # How, when the run dies, and after how many updates the last checkpoint was made.
    "every 2 steps": (
        lambda: ModelCheckpoint("saved", every_n_train_steps=2, save_top_k=-1),
        7,
        6,
    ),
    "every 4 steps, at the end of an epoch": (
        lambda: ModelCheckpoint("saved", every_n_train_steps=4, save_top_k=-1),
        7,
        4,
    ),
    "after validation": (lambda: ModelCheckpoint("saved", save_top_k=-1), 10, 8),
    "at the end of the training epoch": (
        lambda: ModelCheckpoint("saved", save_top_k=-1, save_on_train_epoch_end=True),
        10,
        8,
    ),
    "when it dies": (lambda: OnExceptionCheckpoint("saved"), 7, 7),
}


@pytest.mark.parametrize("every", quick(SCHEDULES, "epoch"))
@pytest.mark.parametrize("how", SAVERS)
def test_run_that_died(tmp_path, how, every):
    """Mode 13: references, the last kernel and the path come from the checkpoint."""
    saver, dies, saved = SAVERS[how]
    before = interrupted(every, dies, saver())
    files = (tmp_path / "saved").iterdir()
    newest = max(files, key=lambda path: path.stat().st_mtime_ns)
    check_curves(every, before, resumed(every, newest), saved)


@pytest.mark.parametrize(
    ("every", "step", "which", "saver"),
    [
        (5, 5, 0, lambda: OnExceptionCheckpoint("saved")),
        (5, 10, 6, lambda: ModelCheckpoint("saved", save_on_exception=True)),
        ("epoch", 8, 1, lambda: ModelCheckpoint("saved", save_on_exception=True)),
        ("epoch", 8, 5, lambda: OnExceptionCheckpoint("saved")),
    ],
)
def test_interrupted_in_a_measurement(tmp_path, every, step, which, saver):
    """It is taken again, as are those of the monitors that did not get to theirs."""
    used, recorder = monitors(every), Recorder()
    instrument = used[which].instrument
    measure = instrument.measure

    def interrupted(model, now):
        measured = measure(model, now)
        if now == step:
            raise KeyboardInterrupt
        return measured

    instrument.measure = interrupted
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run([*used, saver()], recorder)
    files = (tmp_path / "saved").iterdir()
    checkpoint = max(files, key=lambda path: path.stat().st_mtime_ns)
    before, after = recorder.measured(), resumed(every, checkpoint)
    for now, row in unbroken(every).items():
        old, new = before.get(now, {}), after.get(now, {})
        assert not old.keys() & new.keys(), now
        both = {**old, **new}
        # What was foretold of an update is not known when it is measured later.
        late = "prediction/loss" in new and now == step
        lost = {tag for tag in row if late and tag.startswith("prediction/")}
        same(both, {t: row[t] for t in row if t not in lost - {"prediction/loss"}})


def test_checkpoint_of_another_callback_before_ours():
    """Saved behind an update that the monitors have not seen yet."""

    class Saver(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 5:
                trainer.save_checkpoint("5.ckpt")

    run([Saver(), *monitors(5)])
    after = resumed(5, "5.ckpt")
    assert [*after] == [5, 10, LAST]
    for step in (10, LAST):
        same(after[step], unbroken(5)[step], f"step {step}")


def test_fit_goes_on_after_an_interrupt_with_the_same_objects():
    """In a notebook."""
    recorder, used = Recorder(), monitors(5)
    drift = used[1].instrument
    measure = drift.measure

    def interrupted(model, now):
        if now == 5:
            drift.measure = measure
            raise KeyboardInterrupt
        return measure(model, now)

    drift.measure = interrupted
    seeded()
    model = Repeatable()
    trainer = Trainer(**QUIET, max_steps=LAST, callbacks=used, logger=recorder)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.fit(model, loader(), loader(3))
    assert trainer.global_step == 5
    trainer.fit(model, loader(), loader(3))
    tags = {t for t in unbroken(5)[5] if not t.startswith("prediction")}
    found = recorder.measured()
    same(
        {t: v for t, v in found[5].items() if t in tags},
        {t: v for t, v in unbroken(5)[5].items() if t in tags},
    )
    for monitor in used:
        assert [step for step, _ in monitor.history][:2] == [0, 5]


def test_interrupted_from_the_keyboard(tmp_path):
    saver = ModelCheckpoint("saved", every_n_train_steps=3, save_top_k=-1)
    before = interrupted(5, 7, saver, KeyboardInterrupt)
    (checkpoint,) = (tmp_path / "saved").glob("*step=6.ckpt")
    check_curves(5, before, resumed(5, checkpoint), 6)


# Lightning counts the epoch that max_steps cuts short as a whole one, so that epochs
# end elsewhere after resuming.
@pytest.mark.parametrize(("end", "every"), [(6, 5), (8, 5), (8, "epoch"), (5, 5)])
def test_more_steps_after_the_last_one(end, every):
    """The end of the short run is measured, but leaves no corner in the curves."""
    recorder = Recorder()
    short = run(monitors(every), recorder, max_steps=end)
    assert [*recorder.measured()][-1] == end
    short.trainer.save_checkpoint("end.ckpt")
    expected = unbroken(every)
    after = resumed(every, "end.ckpt")
    assert [*after] == [step for step in expected if step > end]
    for step, row in after.items():
        same(row, expected[step], f"step {step}")


@pytest.mark.slow
def test_interrupted_twice():
    run(monitors(5), max_steps=3).trainer.save_checkpoint("3.ckpt")
    second = run(monitors(5), max_steps=7, ckpt_path="3.ckpt")
    second.trainer.save_checkpoint("7.ckpt")
    used, recorder = monitors(5), Recorder()
    run(used, recorder, ckpt_path="7.ckpt")
    expected = unbroken(5)
    assert [*recorder.measured()] == [10, 12]
    for step in (10, 12):
        same(recorder.measured()[step], expected[step])
    # The curves so far travel with the checkpoint, for summaries.
    for monitor in used:
        assert [step for step, _ in monitor.history] == [0, 5, 10, 12]
        for step, row in monitor.history:
            measured = {tag: v for tag, v in row.items() if tag.startswith(PREFIXES)}
            same(measured, {tag: expected[step][tag] for tag in measured})


def test_resumed_where_the_run_was_complete():
    """Nothing is left to train: nothing is measured, nothing is lost."""
    run(monitors(5)).trainer.save_checkpoint("done.ckpt")
    used, recorder = monitors(5), Recorder()
    run(used, recorder, ckpt_path="done.ckpt")
    assert not recorder.measured()
    for monitor in used:
        assert [step for step, _ in monitor.history] == [0, 5, 10]


def test_state_is_read_without_unpickling_code():
    """Mode 14: Lightning loads checkpoints with `weights_only=True`."""
    monitors = [
        NTKMonitor(5, 2, by={"first": "net.0"}, outputs="trace", on_error="raise"),
        NTKMonitor(5, 2, options=NTKOptions(name="ntk_2"), on_error="raise"),
        ParameterDriftMonitor(2, on_error="raise"),
        JacobianMonitor(5, 2, on_error="raise"),
        SignalMonitor(5, 2, on_error="raise"),
        FeatureMonitor(5, 2, on_error="raise"),
        PredictionMonitor(5, 2, on_error="raise"),
        LinearizationMonitor(5, 2, on_error="raise"),
    ]
    done = run(monitors, max_steps=5)
    done.trainer.save_checkpoint("state.ckpt")
    state = torch.load("state.ckpt", weights_only=True)["callbacks"]
    for monitor in monitors:
        found = state[monitor.state_key]
        assert found["step"] == 5
        assert found["measured"] == 4
        assert [step for step, _ in found["history"]] == [0, 2, 4]
        same(found["instrument"], monitor.state_dict()["instrument"])


def test_two_monitors_of_one_type_keep_their_states_apart():
    """Mode 15: Lightning refuses two states under one key."""

    def pair():
        return [
            NTKMonitor(5, 2, options=NTKOptions(name=name), parameters=chosen)
            for name, chosen in (("ntk", "net.0"), ("ntk/last", "net.3"))
        ]

    first, last = pair()
    assert first.state_key != last.state_key
    assert [m.state_key for m in pair()] == [first.state_key, last.state_key]
    keys = {m.state_key for m in (NTKMonitor(), NTKMonitor(every=3))}
    keys |= {ParameterDriftMonitor().state_key, JacobianMonitor().state_key}
    assert len(keys) == 4

    expected = Recorder()
    run(pair(), expected)
    short = run(pair(), max_steps=7)
    short.trainer.save_checkpoint("7.ckpt")
    recorder = Recorder()
    run(pair(), recorder, ckpt_path="7.ckpt")
    assert [*recorder.measured()] == [8, 10, 12]
    for step in (8, 10, 12):
        row = recorder.measured()[step]
        assert row["ntk/trace"] != row["ntk/last/trace"]
        same(row, expected.measured()[step])


def test_state_key_does_not_depend_on_the_process():
    """A function's repr holds its address; its name does not."""
    keys = {
        NTKMonitor(every=lambda step: step == 3, parameters=lambda n, p: True).state_key
        for _ in range(3)
    }
    assert len(keys) == 1
    assert "0x" not in keys.pop()


def test_containers_of_a_configuration_stay_out_of_the_state():
    """Mode 39: what Hydra passes for lists and mappings is not plain Python."""
    metrics = OmegaConf.create(["trace", "kernel_velocity"])
    by = OmegaConf.create({"first": "net.0"})

    def configured():
        return NTKMonitor(5, 5, metrics=metrics, by=by, on_error="raise")

    run([configured()], max_steps=6).trainer.save_checkpoint("6.ckpt")
    assert torch.load("6.ckpt", weights_only=True)["callbacks"]
    recorder = Recorder()
    run([configured()], recorder, ckpt_path="6.ckpt")
    assert [*recorder.measured()] == [10, 12]
    parts = {f"ntk_modules/trace/{part}" for part in ("first", "rest")}
    assert {*recorder.measured()[10]} == {"ntk/trace", "ntk/kernel_velocity", *parts}


def test_checkpoint_without_a_state_takes_references_now():
    """A monitor is added to a run that already trains."""
    bare = run([], max_steps=6)
    bare.trainer.save_checkpoint("bare.ckpt")
    recorder = Recorder()
    with pytest.warns(UserWarning, match="no earlier measurement.*after 6 updates"):
        monitored = run(
            [NTKMonitor(5, 5), ParameterDriftMonitor(5)],
            recorder,
            ckpt_path="bare.ckpt",
        )
    measured = recorder.measured()
    assert [*measured] == [6, 10, 12]
    assert measured[6]["ntk/relative_change"] == 0.0
    assert measured[6]["params/displacement"] == 0.0
    assert measured[12]["params/displacement"] > 0.0
    same(monitored.model.state_dict(), bare_weights())


def test_used_monitor_and_a_checkpoint_without_its_state():
    """References of another run must not leak into this one."""
    bare = run([], max_steps=6)
    bare.trainer.save_checkpoint("bare.ckpt")
    monitor, recorder = ParameterDriftMonitor(5), Recorder()
    fit(Repeatable(), [monitor], val=loader(3), max_epochs=4)
    with pytest.warns(UserWarning, match="no earlier measurement"):
        run([monitor], recorder, ckpt_path="bare.ckpt")
    assert recorder.measured()[6]["params/displacement"] == 0.0


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
def test_changed_schedule_is_another_monitor():
    short = run([NTKMonitor(5, 2)], max_steps=6)
    short.trainer.save_checkpoint("6.ckpt")
    recorder = Recorder()
    with pytest.warns(UserWarning, match="no earlier measurement"):
        run([NTKMonitor(5, 3)], recorder, ckpt_path="6.ckpt")
    assert [*recorder.measured()] == [6, 9, 12]


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
def test_run_resumes_without_the_monitor():
    short = run(monitors(2), max_steps=6)
    short.trainer.save_checkpoint("6.ckpt")
    without = run([], ckpt_path="6.ckpt")
    same(without.model.state_dict(), bare_weights())


def test_another_probe_is_refused_and_training_goes_on():
    short = run([NTKMonitor(Probe(torch.ones(3, 3)), 5)], max_steps=6)
    short.trainer.save_checkpoint("6.ckpt")
    recorder = Recorder()
    with pytest.warns(UserWarning, match="ProbeMismatchError.*other inputs") as caught:
        other = run(
            [NTKMonitor(Probe(torch.zeros(3, 3)), 5)], recorder, ckpt_path="6.ckpt"
        )
    text = str(caught[-1].message)
    assert "Pass the same probe" in text
    assert "off for the rest of this run" in text
    assert not recorder.measured()
    assert other.trainer.global_step == LAST
    same(other.model.state_dict(), bare_weights())


def test_another_number_of_outputs_is_refused():
    """The kernel of a changed model has another shape than its reference."""
    x = torch.ones(3, 3)
    short = run([NTKMonitor(Probe(x), 5)], max_steps=6)
    short.trainer.save_checkpoint("6.ckpt")
    narrow = NTKMonitor(Probe(x), 5)
    narrow.instrument.output_fn = lambda model, x: model(x)[:, :1]
    with pytest.warns(UserWarning, match="the number of outputs changed"):
        run([narrow], ckpt_path="6.ckpt")


class Augmented(Dataset):
    """Other examples each time they are asked for."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        noise = torch.randn(3) + random.random() + float(np.random.rand())  # noqa: NPY002
        return noise * (index + 1), index % 2


@pytest.mark.slow
def test_probe_of_an_augmenting_dataset_is_drawn_again():
    """Wherever the generators stand, the same examples with the same noise."""

    def augmented(recorder, **settings):
        data = DataLoader(Augmented(), batch_size=3, shuffle=True)
        return run(monitors(5), recorder, train=data, **settings)

    expected, after = Recorder(), Recorder()
    augmented(expected)
    augmented(Recorder(), max_steps=6).trainer.save_checkpoint("6.ckpt")
    torch.manual_seed(99)
    augmented(after, ckpt_path="6.ckpt")
    assert [*after.measured()] == [10, 12]
    for step in (10, 12):
        same(after.measured()[step], expected.measured()[step])


def test_probe_from_a_file(tmp_path):
    path = str(tmp_path / "probe.pt")
    Probe(torch.eye(3), torch.tensor([0, 1, 1])).save(path)
    expected = Recorder()
    run([NTKMonitor(path, 5, on_error="raise")], expected)
    run([NTKMonitor(path, 5)], max_steps=6).trainer.save_checkpoint("6.ckpt")
    recorder = Recorder()
    run([NTKMonitor(path, 5, on_error="raise")], recorder, ckpt_path="6.ckpt")
    same(recorder.measured()[10], expected.measured()[10])


def test_state_goes_over_dtypes_of_the_weights():
    """A run in float32 is resumed in float64: the old kernel is read as it is."""
    x = torch.ones(3, 3)
    short = run([NTKMonitor(Probe(x), 5), ParameterDriftMonitor(5)], max_steps=6)
    short.trainer.save_checkpoint("6.ckpt")
    recorder = Recorder()

    class Double(Repeatable):
        def training_step(self, batch, batch_idx):
            loss = cross_entropy(self(torch.ones(2, 3).double()), torch.arange(2))
            self.log("loss", loss)
            return loss

        validation_step = None

    fit(
        Double().double(),
        [NTKMonitor(Probe(x), 5, on_error="raise"), ParameterDriftMonitor(5)],
        logger=recorder,
        ckpt_path="6.ckpt",
        max_steps=LAST,
    )
    measured = recorder.measured()
    assert [*measured] == [10, 12]
    assert all(math.isfinite(row["ntk/relative_change"]) for row in measured.values())

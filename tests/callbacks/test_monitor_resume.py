"""A run that was interrupted and resumed draws the curves of an unbroken one."""

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from monitored import PREFIXES, QUIET, Recorder, loader, same, seeded
from one_of_a_kind import quick
from resumed import (
    LAST,
    RESUMED_ANYWHERE,
    SCHEDULES,
    Repeatable,
    check_curves,
    interrupted,
    monitors,
    resumed,
    run,
    unbroken,
)

pytestmark = RESUMED_ANYWHERE

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

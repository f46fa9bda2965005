"""The linearized network, measured step by step; nothing else notices it."""

import copy
import math
import pickle

import pytest
import torch
from interrupted import Save
from lightning.pytorch import Callback, Trainer
from linearized import ACCURACIES, TAGS, TWIN, Linear, held_out, monitor, rows, run
from monitored import Delicate, Plain, Recorder, loader, same, seeded

from ntk_callbacks import Probe
from ntk_callbacks.callbacks.linearization import LinearizationMonitor
from ntk_callbacks.instruments.linearization import LinearizationInstrument
from ntk_callbacks.instruments.linearization_options import LinearizationOptions


def test_all_scalars_by_steps():
    used = monitor(3, held_out=held_out())
    done = run(Plain, [used])
    found = rows(used)
    assert [*found] == [0, 3, 6, 8]
    for row in found.values():
        assert row.keys() == TAGS | TWIN | ACCURACIES
    assert math.isnan(found[0]["output_distance"])
    assert 0 < found[8]["output_distance"] < 1
    logged = [row for _, row in done.recorder.rows if "linear/loss" in row]
    assert [*logged[-1]] == [*used.history[-1][1], "monitor/seconds_linear"]
    for tag in TAGS | TWIN | ACCURACIES:
        assert f"`linear/{tag}`" in LinearizationMonitor.__doc__


def test_logged_is_what_the_instrument_measures():
    probe, watched = Probe(torch.eye(3), torch.tensor([1, 0, 1])), []

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            instrument = LinearizationInstrument(held_out=held_out())
            instrument.start(probe)
            watched.append((instrument, instrument.measure(pl_module, 0)))

    used = LinearizationMonitor(probe, 4, held_out=held_out(), on_error="raise")
    done = run(Plain, [used, Look()])
    ((instrument, first),) = watched
    same(used.history[0][1], first.scalars)
    same(used.history[-1][1], instrument.measure(done.model, 8).scalars)


@pytest.mark.parametrize("every", [1, "epoch"])
@pytest.mark.parametrize(
    "settings", [{}, {"options": LinearizationOptions(mode="train")}]
)
def test_training_is_the_same_to_the_last_bit(every, settings):
    def delicate(callbacks):
        return run(
            Delicate,
            callbacks,
            train=loader(15, shuffle=True),
            val=loader(6),
            accumulate_grad_batches=2,
            gradient_clip_val=0.1,
            max_steps=9,
        )

    if not settings:
        settings = {"held_out": held_out()}
    used = monitor(every, **settings)
    monitored = delicate([used])
    expected = [*range(10)] if every == 1 else [0, 3, 6, 9]
    assert [*rows(used)] == expected
    assert 0 < rows(used)[9]["twin_output_distance"] < math.inf
    assert not used.instrument.twin.lost
    recorded = monitored.trace()
    recorded["logged"] = [
        row for row in recorded["logged"] if "linear/loss" not in row[1]
    ]
    same(recorded, delicate([]).trace())


class Early(Callback):
    """The batches of a step, whatever the loader has, before anybody looks at them."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        generator = torch.Generator().manual_seed(trainer.global_step)
        batch[0].copy_(torch.randn(batch[0].shape, generator=generator))
        batch[1].copy_(torch.arange(len(batch[1])) % 2)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended")
@pytest.mark.parametrize("every", [1, 3, "epoch"])
@pytest.mark.parametrize("cut", [5, 8])
def test_resumed_run_draws_the_same_curves(every, cut):
    settings = {"held_out": held_out()} if every == 3 else {}
    whole, again = monitor(every, **settings), monitor(every, **settings)
    recorder = Recorder()
    run(Plain, [Early(), whole, Save(cut)], max_steps=12)
    ends = {"max_steps": 12, "ckpt_path": "cut.ckpt", "logger": recorder}
    run(Plain, [Early(), again], **ends)
    expected = dict(whole.history)
    assert [*expected] == {1: [*range(13)], 3: [0, 3, 6, 9, 12]}.get(
        every, [0, 4, 8, 12]
    )
    assert 0 < expected[12]["linear/twin_output_distance"] < math.inf
    same(dict(again.history), expected)
    logged = {
        step: {tag: value for tag, value in row.items() if tag.startswith("linear/")}
        for step, row in recorder.rows
        if "linear/loss" in row
    }
    same(logged, {step: row for step, row in expected.items() if step > cut})
    content = torch.load("cut.ckpt", weights_only=True)["callbacks"]
    assert whole.state_key in content


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended")
def test_run_that_goes_on_after_a_last_step_off_the_schedule():
    """The measurement is forgotten, the steps of the twin are not."""
    used = monitor(3)
    seeded()
    model = Linear()
    trainer = Trainer(
        max_epochs=2,
        callbacks=[used],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(model, loader())
    assert [*rows(used)] == [0, 3, 6, 8]
    trainer.save_checkpoint("8.ckpt")
    trainer.fit_loop.max_epochs = 4
    trainer.fit(model, loader())
    assert [*rows(used)] == [0, 3, 6, 8, 9, 12, 15, 16]
    for name, tensor in model.named_parameters():
        twin = used.instrument.twin.parameters[name]
        assert torch.allclose(twin, tensor, rtol=0, atol=5e-6)
    again = monitor(3)
    resumed = run(Linear, [again], max_steps=16, ckpt_path="8.ckpt")
    assert [*rows(again)] == [0, 3, 6, 9, 12, 15, 16]
    for name, tensor in resumed.model.named_parameters():
        twin = again.instrument.twin.parameters[name]
        assert torch.allclose(twin, tensor, rtol=0, atol=5e-6)


def test_another_run_of_the_same_monitor_starts_anew():
    used = monitor(4)
    run(Plain, [used])
    first = list(used.history)
    run(Plain, [used])
    same(used.history, first)


@pytest.mark.parametrize(
    "copy_of",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "pickle"],
)
def test_copies_before_and_after_use(copy_of):
    used = copy_of(monitor(4))
    run(Plain, [used])
    again = copy_of(used)
    same(again.history, used.history)
    assert again.state_key == used.state_key
    run(Plain, [again])
    same(again.history, used.history)
    same(again.instrument.twin.parameters, used.instrument.twin.parameters)


def test_state_keys_tell_monitors_apart():
    keys = {
        LinearizationMonitor(**settings).state_key
        for settings in (
            {},
            {"every": 3},
            {"twin": True},
            {"options": LinearizationOptions(mode="train")},
            {"options": LinearizationOptions(threshold=0.5)},
            {"options": LinearizationOptions(name="linear_2")},
        )
    }
    assert len(keys) == 6


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_other_precisions(precision):
    used = monitor(4)
    done = run(Plain, [used], precision=precision)
    assert [*rows(used)] == [0, 4, 8]
    assert 0 < rows(used)[8]["twin_output_distance"] < 2
    same(done.trace()["weights"], run(Plain, precision=precision).trace()["weights"])


def test_held_out_probes_come_from_files():
    held_out().save("held_out.pt")
    used = monitor(8, twin=False, held_out="held_out.pt")
    run(Plain, [used])
    assert rows(used)[8].keys() == TAGS | ACCURACIES
    with pytest.raises(ValueError, match="held_out is a int"):
        LinearizationMonitor(held_out=64)

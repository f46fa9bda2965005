"""What monitors put into a checkpoint, and what they do without it."""

import math
import random

import numpy as np
import pytest
import torch
from monitored import Recorder, fit, loader, same
from omegaconf import OmegaConf
from resumed import LAST, RESUMED_ANYWHERE, Repeatable, bare_weights, monitors, run
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

pytestmark = RESUMED_ANYWHERE


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

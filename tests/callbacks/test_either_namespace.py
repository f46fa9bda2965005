"""Monitors measure the same under either name of Lightning."""

import lightning.pytorch
import pytest
import pytorch_lightning
from monitored import OtherPlain, Plain, Recorder, fit, same, seeded, three_monitors

NAMESPACES = {
    "lightning.pytorch": (lightning.pytorch.Trainer, Plain),
    "pytorch_lightning": (pytorch_lightning.Trainer, OtherPlain),
}


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("index", range(3), ids=["ntk", "drift", "jacobian"])
def test_single_monitor_in_either_namespace(namespace, index):
    """Mode 33: given alone or in a list, to the Trainer of either package."""
    kind, model = NAMESPACES[namespace]
    alone = fit(model(), three_monitors(3)[index], kind=kind)
    assert [*alone.recorder.measured()] == [0, 3, 6, 8]
    listed = fit(model(), [three_monitors(3)[index]], kind=kind)
    assert [*listed.recorder.measured()] == [0, 3, 6, 8]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended")
@pytest.mark.parametrize("namespace", NAMESPACES)
def test_resume_in_either_namespace(namespace):
    """Mode 33: the state is saved and found again."""
    kind, model = NAMESPACES[namespace]
    short = fit(model(), three_monitors(3), kind=kind, max_steps=6)
    short.trainer.save_checkpoint("6.ckpt")
    recorder = Recorder()
    fit(
        model(),
        three_monitors(3),
        kind=kind,
        max_steps=12,
        ckpt_path="6.ckpt",
        logger=recorder,
    )
    assert [*recorder.measured()] == [9, 12]
    assert recorder.measured()[9]["params/displacement"] > 0


def test_both_namespaces_log_the_same_numbers():
    runs = []
    for kind, model in NAMESPACES.values():
        seeded()
        runs.append(fit(model(), three_monitors(3), kind=kind).recorder.measured())
    same(*runs)


def test_monitors_from_configure_callbacks():
    class Own(Plain):
        def configure_callbacks(self):
            return three_monitors(3)

    assert [*fit(Own()).recorder.measured()] == [0, 3, 6, 8]

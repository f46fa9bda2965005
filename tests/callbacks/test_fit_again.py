"""A run that goes on with the same objects, and another run with them."""

import pytest
import torch
from measured_steps import drift
from monitored import Plain, fit, loader, same, seeded

from ntk_callbacks import NTKMonitor


def test_fit_twice_goes_on_where_it_stopped():
    """Modes 38 and 13: one trainer, two fits, one reference."""

    class Memoryless(Plain):  # because the second fit makes a new optimizer
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    seeded()
    monitor = drift(3)
    run = fit(Memoryless(), [monitor])
    first = run.recorder.steps("params/displacement")
    run.trainer.fit_loop.max_epochs = 4
    run.trainer.fit(run.model, loader())
    both = run.recorder.steps("params/displacement")
    assert first == [0, 3, 6, 8]
    assert both == [0, 3, 6, 8, 9, 12, 15, 16]
    seeded()
    unbroken = fit(Memoryless(), [drift(3)], max_epochs=4).recorder.measured()
    for step in (9, 12, 15, 16):
        same(run.recorder.measured()[step], unbroken[step])


def test_same_monitor_in_a_second_trainer_starts_afresh():
    seeded()
    expected = fit(Plain(), [NTKMonitor(4, 3, on_error="raise")]).recorder.measured()
    monitor = NTKMonitor(4, 3, on_error="raise")
    fit(Plain(), [monitor], train=loader(6), max_epochs=3)
    seeded()
    second = fit(Plain(), [monitor])
    assert [*second.recorder.measured()] == [0, 3, 6, 8]
    same(second.recorder.measured(), expected)


def test_same_monitor_after_a_run_that_died_at_once():
    """A notebook: the first training step raises, the cell is corrected and run."""

    class Broken(Plain):
        def training_step(self, batch, batch_idx):
            raise ValueError("a mistake")

    monitor = drift(3)
    with pytest.raises(ValueError, match="a mistake"):
        fit(Broken(), [monitor])
    seeded(5)
    second = fit(Plain(), [monitor])
    assert [*second.recorder.measured()] == [0, 3, 6, 8]
    assert second.recorder.measured()[0]["params/displacement"] == 0.0


def test_monitor_that_stepped_aside_tries_again_in_a_new_run():
    monitor = NTKMonitor(20, 3)
    with pytest.warns(UserWarning, match="off for the rest of this run"):
        assert not fit(Plain(), [monitor]).recorder.measured()
    second = fit(Plain(), [monitor], train=loader(20, 5))
    assert [*second.recorder.measured()] == [0, 3, 6, 8]

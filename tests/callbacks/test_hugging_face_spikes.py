"""Loss spikes in the Trainer of transformers, seen where each loss is logged."""

from typing import ClassVar

import hugging_face
import pytest
from hugging_face import NOISE, SAVING, bert, measured, trace, train
from monitored import copied, same
from transformers import Trainer, TrainerCallback

from ntk_callbacks import (
    NTKTrainerCallback,
    ParameterDriftMonitor,
    PredictionMonitor,
    either,
    loss_spike,
)

offline = hugging_face.offline

pytestmark = NOISE


class Spiky(Trainer):
    """The loss is multiplied in given updates of two batches each, from 1."""

    factors: ClassVar[dict[int, float]] = {}
    calls = 0

    def compute_loss(self, *args, **kwargs):
        self.calls += 1
        loss = super().compute_loss(*args, **kwargs)
        return loss * self.factors.get((self.calls + 1) // 2, 1.0)


def spiky(factors, callbacks, **settings):
    return train(
        callbacks, kind=type("Spiky", (Spiky,), {"factors": factors}), **settings
    )


SPIKES = either("epoch", loss_spike(4, over=4))


def test_loss_spikes_are_seen_where_each_loss_is_logged():
    factors = {5: 50.0, 8: 1e4}
    drift = ParameterDriftMonitor(SPIKES, on_error="raise")
    foretold = PredictionMonitor(6, SPIKES, on_error="raise")
    run = spiky(factors, [NTKTrainerCallback([drift, foretold])])
    rows = measured(run)
    assert [*rows] == [0, 3, 5, 6, 8, 9]  # no spike goes on, none is measured twice
    assert "prediction/loss_change_optimizer" in rows[6]
    assert "prediction/loss_change_optimizer" not in rows[5]
    same(trace(run), trace(spiky(factors, [])))
    # At the end of an epoch and of the run an update is due already.
    run = spiky({6: 50.0, 9: 1e4}, [NTKTrainerCallback(drift)], output_dir="again")
    assert [*measured(run)] == [0, 3, 6, 9]


def test_weights_of_a_spike_are_those_right_after_its_update():
    class Keep(TrainerCallback):
        weights = None

        def on_step_end(self, args, state, control, model, **_):
            if state.global_step == 5:
                self.weights = copied(model.state_dict())

    keep, start = Keep(), bert()
    drift = ParameterDriftMonitor(loss_spike(4, over=4), on_error="raise")
    run = spiky({5: 50.0}, [NTKTrainerCallback(drift), keep])
    pairs = [(p.detach(), keep.weights[n]) for n, p in start.named_parameters()]
    moved = sum(float((now - p).square().sum()) for p, now in pairs) ** 0.5
    norm = sum(float(p.square().sum()) for p, _ in pairs) ** 0.5
    row = measured(run)[5]
    assert row["params/displacement"] == pytest.approx(moved / norm, rel=1e-5)


@pytest.mark.parametrize(
    "settings", [{"logging_steps": 2}, {"logging_strategy": "epoch"}]
)
def test_loss_spikes_are_not_looked_for_in_means(settings):
    drift = ParameterDriftMonitor(loss_spike(4, over=2), on_error="raise")
    with pytest.warns(UserWarning, match=r"loss of each update.*logging_steps=1"):
        run = spiky({8: 1e4}, [NTKTrainerCallback(drift)], **settings)
    assert [*measured(run)] == [0, 9]


@pytest.mark.parametrize(("filtered", "steps"), [(True, [0, 9]), (False, [0, 7, 9])])
def test_loss_that_is_not_finite(filtered, steps):
    drift = ParameterDriftMonitor(loss_spike(4, over=4))
    settings = {"logging_nan_inf_filter": filtered}
    run = spiky({7: float("nan")}, [NTKTrainerCallback(drift)], **settings)
    assert [*measured(run)] == steps


def test_resumed_after_a_spike_at_the_end_is_unbroken():
    """What is seen in the last loss of a run is no matter of its being the last."""

    def callback():
        drift = ParameterDriftMonitor(loss_spike(4, over=4), on_error="raise")
        return NTKTrainerCallback(drift)

    factors = {5: 50.0}
    whole, used = callback(), callback()
    spiky(factors, [whole], output_dir="whole")
    spiky(factors, [callback()], stop=5, **SAVING)
    spiky({}, [used], resume="out/checkpoint-5", **SAVING)
    (kept,), (expected,) = used.monitors, whole.monitors
    assert [step for step, _ in expected.history] == [0, 5, 9]
    same(kept.history, expected.history)
    same(kept.when.state_dict(), expected.when.state_dict())

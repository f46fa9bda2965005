"""Runs of the Trainer of transformers that are stopped, and exactly resumed."""

import hugging_face
import pytest
from hugging_face import NOISE, SAVING, measured, monitors, train
from monitored import copied, same
from transformers import EarlyStoppingCallback

from ntk_callbacks import NTKTrainerCallback, ParameterDriftMonitor, load_history

offline = hugging_face.offline

pytestmark = NOISE


def test_stopped_by_another_callback():
    drift = ParameterDriftMonitor(100, on_error="raise")
    run = train([NTKTrainerCallback(drift)], stop=4)
    assert [*measured(run)] == [0, 4]
    drift = ParameterDriftMonitor(100, on_error="raise")
    patience = EarlyStoppingCallback(1, early_stopping_threshold=100.0)
    run = train(
        [patience, NTKTrainerCallback(drift)],
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
        output_dir="patient",
    )
    assert run.state.global_step == 6
    # The best weights, of another step, are in the model when the training ends.
    assert [*measured(run)] == [0]


@pytest.mark.slow
@pytest.mark.parametrize(("every", "at"), [(5, 4), (5, 5), ("epoch", 6), ("epoch", 4)])
def test_interrupted_and_resumed_is_unbroken(every, at, tmp_path):
    unbroken = train([NTKTrainerCallback(monitors(every))], output_dir="whole")
    train([NTKTrainerCallback(monitors(every))], stop=at, **SAVING)
    path = f"out/checkpoint-{at}"
    used = monitors(every)
    resumed = train([NTKTrainerCallback(used)], resume=path, **SAVING)
    same(copied(resumed.model.state_dict()), copied(unbroken.model.state_dict()))
    expected = measured(unbroken)
    for step, row in expected.items():
        same(measured(resumed)[step], row, f"step {step}")
    # Off schedule, the end of the short run is in its log, but in no curve.
    extra = {*measured(resumed)} - {*expected}
    assert extra <= {at}
    for monitor in used:
        assert [step for step, _ in monitor.history] == [*expected]
    history, whole = load_history("out"), load_history("whole")
    assert {*history} == {*whole}
    for tag in whole.scalars:
        if not tag.startswith("monitor/"):
            assert history[tag].steps.tolist() == whole[tag].steps.tolist(), tag
            assert history[tag].values.tolist() == pytest.approx(
                whole[tag].values.tolist(), nan_ok=True, rel=0, abs=0
            )


def test_checkpoint_without_references_says_that_they_are_taken_now():
    train(stop=4, **SAVING)
    drift = NTKTrainerCallback(ParameterDriftMonitor(5))
    with pytest.warns(UserWarning, match="no earlier measurement.*after 4 updates"):
        run = train([drift], resume="out/checkpoint-4")
    assert [*measured(run)] == [4, 5, 9]


def test_references_of_other_weights_are_not_read():
    train([NTKTrainerCallback(ParameterDriftMonitor(5))], stop=4, **SAVING)
    train([], stop=4, learning_rate=0.02, **(SAVING | {"output_dir": "other"}))
    drift = NTKTrainerCallback(ParameterDriftMonitor(5))
    with (
        pytest.warns(UserWarning, match="belongs to other weights"),
        pytest.warns(UserWarning, match="no earlier measurement"),
    ):
        train([drift], resume="other/checkpoint-4")

"""Monitors in the Trainer of transformers: the same training, the same numbers."""

import json
from pathlib import Path

import hugging_face
import pytest
import torch
from hugging_face import (
    NOISE,
    SAVING,
    SMALL,
    bert,
    measured,
    monitors,
    sentences,
    trace,
    train,
)
from monitored import copied, generator_states, same, seeded
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from ntk_callbacks import (
    JacobianMonitor,
    LinearizationMonitor,
    NTKMonitor,
    NTKTrainerCallback,
    ParameterDriftMonitor,
    PredictionMonitor,
    Probe,
    empirical_ntk,
    load_history,
)

offline = hugging_face.offline

pytestmark = NOISE


class Watch(TrainerCallback):
    """What is only there between two updates."""

    def __init__(self):
        self.seen = []

    def on_substep_end(self, args, state, control, model, **_):
        self.look(model)

    def on_step_end(self, args, state, control, model, **_):
        self.look(model)

    def look(self, model):
        gradients = [p.grad for p in model.parameters()]
        flags = [part.training for part in model.modules()]
        self.seen.append((copied(gradients), flags, generator_states()))


def test_nothing_of_the_training_changes():
    watch, watch_bare = Watch(), Watch()
    run = train([watch, NTKTrainerCallback(monitors(2))])
    bare = train([watch_bare])
    assert [*measured(run)] == [0, 2, 4, 6, 8, 9]
    same(trace(run), trace(bare))
    assert len(watch.seen) == 18
    same(watch.seen, watch_bare.seen)


def test_numbers_are_those_of_the_weights():
    class Keep(TrainerCallback):
        weights = None

        def on_step_end(self, args, state, control, model, **_):
            if state.global_step == 5:
                self.weights = copied(model.state_dict())

    probe = Probe.from_loader(torch.utils.data.DataLoader(sentences(), batch_size=4), 6)
    assert {*probe.inputs} == {"input_ids", "attention_mask"}
    keep = Keep()
    run = train([NTKTrainerCallback(NTKMonitor(probe, 5, on_error="raise")), keep])
    model = bert().eval()
    start = empirical_ntk(model, probe.inputs, output_fn=lambda m, x: m(**x).logits)
    model.load_state_dict(keep.weights)
    now = empirical_ntk(model, probe.inputs, output_fn=lambda m, x: m(**x).logits)
    row = measured(run)[5]
    moved = float((now - start).norm() / start.norm())
    assert moved > 1e-3
    assert row["ntk/relative_change"] == pytest.approx(moved, rel=1e-4)
    trace_now = float(torch.einsum("nncc->", now))
    assert row["ntk/trace"] == pytest.approx(trace_now, rel=1e-5)


def test_foretold_steps_are_those_the_optimizer_takes():
    """AdamW, weight decay, a falling rate, clipped and accumulated gradients."""
    settings = {"weight_decay": 0.1, "max_grad_norm": 0.05, "warmup_steps": 2}
    run = train([NTKTrainerCallback(PredictionMonitor(6, 1))], **settings)
    rows = measured(run)
    assert [*rows] == [*range(10)]
    assert all(rows[step]["prediction/step_error"] == 0.0 for step in range(1, 10))
    assert all("prediction/loss_change_actual" in rows[step] for step in range(1, 10))


@pytest.mark.parametrize(
    ("every", "steps"),
    [("epoch", [0, 3, 6, 9]), (4, [0, 4, 8, 9]), ("at 1 7", [0, 1, 7, 9])],
)
def test_when_it_measures(every, steps):
    run = train([NTKTrainerCallback(ParameterDriftMonitor(every, on_error="raise"))])
    assert [*measured(run)] == steps


def test_second_training_starts_afresh():
    callback = NTKTrainerCallback(ParameterDriftMonitor("epoch"))
    run = train([callback])
    with pytest.warns(UserWarning, match="the measurements of another run"):
        run.train()
    assert [step for step, _ in callback.monitors[0].history] == [0, 3, 6, 9]


def test_failing_measurement_warns_and_steps_aside():
    def broken(model, x):
        raise ArithmeticError("no number")

    callback = NTKTrainerCallback(NTKMonitor(4, 1, output_fn=broken))
    with pytest.warns(UserWarning, match="NTKMonitor.*no number.*training goes on"):
        run = train([callback])
    assert not measured(run)
    same(trace(run), trace(train()))


def test_a_linearized_twin_is_refused_with_the_reason():
    monitor = LinearizationMonitor(4, 100, twin=True)
    with pytest.warns(UserWarning, match=r"twin is off.*does not show.*linearize"):
        run = train([NTKTrainerCallback(monitor)])
    assert "linear/output_distance" in measured(run)[9]


def test_inputs_that_are_tokens_have_no_input_jacobian():
    with pytest.warns(UserWarning, match=r"JacobianMonitor.*off for the rest of this"):
        run = train([NTKTrainerCallback(JacobianMonitor(4, 3))])
    assert not measured(run)


@pytest.mark.slow
def test_half_precision_arithmetic_is_left_aside():
    rows = []
    for bf16 in (True, False):
        callback = NTKTrainerCallback(NTKMonitor(4, 100, on_error="raise"))
        run = train([callback], bf16=bf16, output_dir=f"bf16={bf16}")
        assert ("_original_forward" in vars(run.model)) == bf16
        rows.append(measured(run)[0])
        if bf16:
            same(trace(run), trace(train(bf16=True)))
    same(*rows)


@pytest.mark.slow
def test_language_model_at_its_last_token():
    seeded()
    config = GPT2Config(**SMALL, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    model, twin = GPT2LMHeadModel(config), GPT2LMHeadModel(config)
    twin.load_state_dict(model.state_dict())
    monitor = NTKMonitor(
        3, 4, output_fn=lambda m, x: m(**x).logits[:, -1], on_error="raise"
    )
    data = sentences(labels=False)
    run = train([NTKTrainerCallback(monitor)], model=model, data=data)
    assert [*measured(run)] == [0, 4, 8, 9]
    assert monitor.instrument.state_dict()["reference"].shape == (3, 3, 20, 20)
    same(trace(run), trace(train(model=twin, data=data)))


def test_where_the_numbers_go():
    run = train(
        [NTKTrainerCallback(monitors("epoch"))], report_to="tensorboard", **SAVING
    )
    kept = json.loads(Path("out/checkpoint-9/trainer_state.json").read_text())
    rows = [row for row in kept["log_history"] if "ntk/trace" in row]
    assert [row["step"] for row in rows] == [0, 3, 6, 9]
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator("out/runs/ntk").Reload()
    assert [event.step for event in read.Scalars("ntk/trace")] == [0, 3, 6, 9]
    assert "ntk/kernel" in read.Tags()["images"]
    assert load_history("out")["ntk/trace"].steps.tolist() == [0, 3, 6, 9]
    assert len(measured(run)) == 4


def test_loggers_of_ones_own():
    class Kept:
        rows = ()

        def log_metrics(self, metrics, step):
            self.rows = (*self.rows, step)

    kept = Kept()
    train([NTKTrainerCallback(ParameterDriftMonitor(4), loggers=[kept])])
    assert kept.rows == (0, 4, 8, 9)


def test_only_monitors_are_taken():
    with pytest.raises(TypeError, match=r"takes monitors such as.*not a Linear"):
        NTKTrainerCallback([nn.Linear(2, 2)])

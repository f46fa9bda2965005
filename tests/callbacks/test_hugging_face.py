"""Monitors in the Trainer of transformers: the same training, exactly resumed."""

import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from monitored import PREFIXES, copied, generator_states, same, seeded
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ntk_callbacks import (
    JacobianMonitor,
    LinearizationMonitor,
    NTKMonitor,
    NTKTrainerCallback,
    ParameterDriftMonitor,
    PredictionMonitor,
    Probe,
    SignalMonitor,
    either,
    empirical_ntk,
    load_history,
    loss_spike,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:(transformers|accelerate).*"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


SMALL = {"vocab_size": 20, "attn_implementation": "eager"}


def bert():
    seeded()
    return BertForSequenceClassification(
        BertConfig(
            **SMALL,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=8,
        )
    )


def sentences(n=24, labels=True):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(20, (n, 6), generator=generator)
    return [
        {
            "input_ids": row,
            "attention_mask": torch.ones(6, dtype=torch.long),
            "labels": index % 2 if labels else row,
        }
        for index, row in enumerate(tokens)
    ]


def monitors(every=5, probe=6):
    return [
        NTKMonitor(probe, every, by="module", on_error="raise"),
        ParameterDriftMonitor(every, on_error="raise"),
        SignalMonitor(probe, every, on_error="raise"),
        PredictionMonitor(probe, every, on_error="raise"),
    ]


def train(
    callbacks=(),
    *,
    model=None,
    data=None,
    resume=None,
    stop=None,
    kind=Trainer,
    **settings,
):
    """3 epochs of 6 batches and of 3 updates; dropout is on."""
    chosen = {
        "output_dir": "out",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 3,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **settings,
    }
    trainer = kind(
        model=model or bert(),
        args=TrainingArguments(**chosen),
        train_dataset=data or sentences(),
        eval_dataset=sentences(4),
        callbacks=[*callbacks, *([StopAt(stop)] if stop else [])],
    )
    seeded()
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= self.step


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


def measured(trainer):
    """Step -> what monitors logged there."""
    found = {}
    for row in trainer.state.log_history:
        for tag, value in row.items():
            if tag.startswith(PREFIXES):
                assert tag not in found.setdefault(row["step"], {}), tag
                found[row["step"]][tag] = value
    return found


def trace(trainer):
    """Everything that must be the same with and without monitors."""
    timed = ("runtime", "per_second")
    return {
        "weights": copied(trainer.model.state_dict()),
        "optimizer": copied(trainer.optimizer.state_dict()),
        "generators": generator_states(),
        "logged": [
            {k: v for k, v in row.items() if not k.endswith(timed)}
            for row in trainer.state.log_history
            if not any(tag.startswith((*PREFIXES, "monitor/")) for tag in row)
        ],
        "attributes": [sorted(vars(part)) for part in trainer.model.modules()],
    }


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


SAVING = {"save_strategy": "steps", "save_steps": 1}
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

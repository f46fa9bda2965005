"""Small runs of the Trainer of transformers, and what they leave behind."""

import pytest
import torch
from monitored import PREFIXES, copied, generator_states, seeded
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ntk_callbacks import (
    NTKMonitor,
    ParameterDriftMonitor,
    PredictionMonitor,
    SignalMonitor,
)

NOISE = [
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


SAVING = {"save_strategy": "steps", "save_steps": 1}

"""Monitors on the Trainer of Hugging Face's transformers.

A small BERT, drawn at random, learns whether a sentence of made-up words holds more of
the one kind than of the other. One callback hands the model to the monitors; their
numbers stand in `trainer.state.log_history`, in TensorBoard, and in files that
`load_history` reads.
"""

import sys

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from ntk_callbacks import (
    NTKMonitor,
    NTKTrainerCallback,
    ParameterDriftMonitor,
    load_history,
)


def sentences(n: int) -> list[dict[str, object]]:
    """Sentences of 12 words out of 30; the label says whether most are above 15."""
    words = torch.randint(30, (n, 12))
    labels = ((words >= 15).sum(1) > 6).long()
    return [
        {"input_ids": row, "labels": int(label)}
        for row, label in zip(words, labels, strict=True)
    ]


def main(fast: bool) -> None:
    """Train for 5 epochs, or for 1."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=30,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
        )
    )
    monitors = [
        NTKMonitor(probe=32, every="5 per decade"),
        ParameterDriftMonitor(every="epoch"),
    ]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir="hugging_face",
            num_train_epochs=1 if fast else 5,
            per_device_train_batch_size=32,
            learning_rate=1e-3,
            logging_steps=5,
            report_to="tensorboard",
            save_strategy="no",
            use_cpu=True,
        ),
        train_dataset=sentences(256 if fast else 2048),
        callbacks=[NTKTrainerCallback(monitors)],
    )
    trainer.train()
    drift = load_history("hugging_face")["ntk/relative_change"]
    for step, change in zip(drift.steps, drift.values, strict=True):
        print(f"step {step:4d}: the kernel has changed by {change:.1%}")
    print("Look at the curves with: tensorboard --logdir hugging_face/runs")


if __name__ == "__main__":
    main(fast="--fast" in sys.argv[1:])

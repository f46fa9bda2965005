"""What the next step will do to the loss, said before it and checked after it.

A network learns scikit-learn's digits with AdamW. Before some of its steps the change
of the loss on images it does not train on is predicted twice from the tangent kernel:
for a step of plain gradient descent, and for the step that AdamW will really take.
The first is many times too small, the second nearly right.
"""

import sys

import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from ntk_callbacks import PredictionMonitor, Probe


class Classifier(LightningModule):
    """A small network with normalized layers, clipped and accumulated gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 10))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        x, y = batch
        return cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 2e-4, weight_decay=0.1)


def main(fast: bool) -> None:
    """Train for 12 steps, or for 300."""
    torch.manual_seed(0)
    images, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16).float(), torch.tensor(digits)
    watched = Probe(x[:128], y[:128])
    loader = DataLoader(TensorDataset(x[128:], y[128:]), batch_size=64, shuffle=True)
    monitor = PredictionMonitor(watched, "4 per decade", on_error="raise")
    trainer = Trainer(
        max_steps=12 if fast else 300,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[monitor],
        logger=False,
        enable_checkpointing=False,
        accelerator="cpu",
    )
    trainer.fit(Classifier(), loader)

    print("change of the loss: predicted for descent, for AdamW, and as it came")
    for step, found in monitor.history[1:]:
        plain, own, actual = (
            found[f"prediction/loss_change_{which}"]
            for which in ("gradient_flow", "optimizer", "actual")
        )
        explained = found["prediction/explained"]
        print(f"step {step:3} {plain:+.6f} {own:+.6f} {actual:+.6f} {explained:6.1%}")


if __name__ == "__main__":
    main(fast="--fast" in sys.argv[1:])

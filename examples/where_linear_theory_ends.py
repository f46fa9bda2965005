"""Where linear theory ends for a network, and what lies beyond.

A network reads scikit-learn's digits. All along it is compared with its linearization
around the start: with the one at its own weights, and with a linearized twin that
trains beside it on the same batches. Kernel regression on images it does not train on
says what the kernel itself has learned: with the kernel of the start, and the one now.
"""

import sys

import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from ntk_callbacks import LinearizationMonitor, LinearizationOptions, Probe


class Classifier(LightningModule):
    """A small network, trained with AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        x, y = batch
        return cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.003)


def main(fast: bool) -> None:
    """Train for 30 steps, or for 300."""
    torch.manual_seed(0)
    images, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16).float(), torch.tensor(digits)
    loader = DataLoader(TensorDataset(x[:1000], y[:1000]), batch_size=100, shuffle=True)
    monitor = LinearizationMonitor(
        Probe(x[:100], y[:100]),
        "4 per decade",
        twin=True,
        held_out=Probe(x[1000:1200], y[1000:1200]),
        options=LinearizationOptions(threshold=0.25),
        on_error="raise",
    )
    trainer = Trainer(
        max_steps=30 if fast else 300,
        callbacks=[monitor],
        logger=False,
        enable_checkpointing=False,
        accelerator="cpu",
    )
    trainer.fit(Classifier(), loader)

    print("      distance to the linearized     images read right by regression with")
    print("step   network       twin       the network   the kernel at first   now")
    shown = (
        *("output_distance", "twin_output_distance", "network_accuracy"),
        *("initial_kernel_accuracy", "after_kernel_accuracy"),
    )
    for step, found in monitor.history:
        away, twin, right, first, now = (found[f"linear/{which}"] for which in shown)
        print(
            f"{step:4} {away:9.3f} {twin:10.3f} {right:16.3f} {first:17.3f} {now:9.3f}"
        )
    parted = monitor.history[-1][1]["linear/parting_step"]
    print(f"network and linearization parted at step {parted:.0f}")


if __name__ == "__main__":
    main(fast="--fast" in sys.argv[1:])

"""Monitoring an ordinary Lightning script: one line of it is about monitoring.

A small network learns scikit-learn's 8×8 digits. TensorBoard then shows, beside the
loss, the groups `ntk` (the kernel moves fast in the first epochs, then settles; its
image has a block for each class that grows sharper), `params` (how far every tensor of
weights traveled) and `jacobian` (how strongly the outputs react to the pixels).
"""

import sys

import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ntk_callbacks import JacobianMonitor, NTKMonitor, ParameterDriftMonitor


class Classifier(LightningModule):
    """A network with one hidden layer, as anyone would write it."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10))

    def forward(self, x):
        """Logits of a batch of images."""
        return self.net(x)

    def training_step(self, batch, batch_idx):
        """Cross-entropy of one batch."""
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("loss/train", loss)
        return loss

    def configure_optimizers(self):
        """Plain gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main(fast: bool) -> None:
    """Train for 30 epochs, or for 2."""
    images, digits = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16).float(), torch.tensor(digits))
    trainer = Trainer(
        max_epochs=2 if fast else 30,
        log_every_n_steps=10,
        callbacks=[NTKMonitor(), ParameterDriftMonitor(), JacobianMonitor()],
    )
    trainer.fit(Classifier(), DataLoader(data, batch_size=64, shuffle=True))
    print(f"Look at the curves with: tensorboard --logdir {trainer.log_dir}")


if __name__ == "__main__":
    main(fast="--fast" in sys.argv[1:])

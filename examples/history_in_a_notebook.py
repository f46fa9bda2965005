"""What a run leaves behind, read into arrays: no event files, no TensorBoard.

Every monitor keeps its measurements in `ntk_history` in the folder of the run, however
the run ends. Here a small network learns scikit-learn's digits; then the history is
read as one would read it in a notebook, days later, without the model.
"""

import sys

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ntk_callbacks import NTKMonitor, NTKOptions, ParameterDriftMonitor, load_history


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(epochs: int) -> str:
    """Folder of a run; the kernels themselves are kept too."""
    images, digits = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16).float(), torch.tensor(digits))
    options = NTKOptions(keep_kernels=True)
    trainer = Trainer(
        max_epochs=epochs,
        logger=CSVLogger("runs"),
        callbacks=[NTKMonitor(options=options), ParameterDriftMonitor()],
    )
    trainer.fit(Classifier(), DataLoader(data, batch_size=64, shuffle=True))
    return trainer.logger.log_dir


def main(fast: bool) -> None:
    """Train for 10 epochs, or for 2, and look back."""
    folder = train(2 if fast else 10)

    history = load_history(folder)
    print(history)
    meant = history.conventions["ntk"]
    print(f"kernel of {meant['outputs']} outputs on {meant['probe_examples']} images")

    distance = history["ntk/kernel_distance"]
    for step, value in zip(distance.steps, distance.values, strict=True):
        print(f"step {step}: kernel distance {value:.4f}")

    # A spectrum has a length of its own at each step: a list of arrays.
    first, *_, last = history["ntk/eigenvalues_log10"].values
    print(f"largest eigenvalue 10^{first.max():.2f}, at the end 10^{last.max():.2f}")

    kernels = history["ntk/kernel"]  # traced, the images ordered by class
    print("kernels kept:", len(kernels.values), "of shape", kernels.values[0].shape)
    print(f"One page about it: ntk-report {folder}")


if __name__ == "__main__":
    main(fast="--fast" in sys.argv[1:])

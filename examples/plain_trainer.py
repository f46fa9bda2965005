"""An ordinary Lightning script on 8×8 digits: one line of it is about monitoring."""

import sys

import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ntk_callbacks import JacobianMonitor, NTKMonitor, ParameterDriftMonitor


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("loss/train", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


images, digits = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(images / 16).float(), torch.tensor(digits))
trainer = Trainer(
    max_epochs=2 if "--fast" in sys.argv else 30,
    log_every_n_steps=10,
    callbacks=[NTKMonitor(), ParameterDriftMonitor(), JacobianMonitor()],
)
trainer.fit(Classifier(), DataLoader(data, batch_size=64, shuffle=True))
print(f"Look at the curves with: tensorboard --logdir {trainer.log_dir}")

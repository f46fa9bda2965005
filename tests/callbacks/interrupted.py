"""Runs that are cut at a step and resumed."""

import torch
from lightning.pytorch import Callback
from monitored import Plain
from torch.nn.functional import cross_entropy


class Save(Callback):
    """A checkpoint after an update, in the middle of an epoch or at its end."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint("cut.ckpt")


class Repeatable(Plain):
    """Trains on data made from the step, so that a resumed loader does not matter."""

    def training_step(self, batch, batch_idx):
        generator = torch.Generator().manual_seed(self.global_step)
        x = torch.randn(6, 3, generator=generator)
        return cross_entropy(self(x), torch.arange(6) % 2)

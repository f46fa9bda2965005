"""Runs that are cut at a step and resumed."""

from lightning.pytorch import Callback


class Save(Callback):
    """A checkpoint after an update, in the middle of an epoch or at its end."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint("cut.ckpt")

"""A script on two processes: `python two_processes.py FOLDER with|without`."""

import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback
from monitored import Delicate, Recorder, fit, loader, seeded, three_monitors
from torch import nn

from ntk_callbacks import (
    NTKMonitor,
    NTKOptions,
    PredictionMonitor,
    SignalMonitor,
    empirical_ntk,
)
from ntk_callbacks.errors import UnsupportedModelError


def failing(module, x):
    raise ArithmeticError("only on one process")


class Synchronized(Callback):
    """Measures, on one process, a module whose layers would wait for the other."""

    text = ""

    def on_train_start(self, trainer, pl_module):
        if trainer.global_rank == 0:
            net = nn.Sequential(nn.Linear(3, 2), nn.SyncBatchNorm(2))
            empirical_ntk(net, torch.randn(4, 3))
            try:
                empirical_ntk(net, torch.randn(4, 3), mode="train")
            except UnsupportedModelError as error:
                self.text = str(error)


def callbacks(monitored):
    if not monitored:
        return []
    broken = NTKMonitor(4, 1, output_fn=failing, options=NTKOptions(name="ntk/broken"))
    others = [
        kind(4, 3, on_error="raise") for kind in (PredictionMonitor, SignalMonitor)
    ]
    return [*three_monitors(every=3), *others, broken]


def train(callbacks, **settings):
    seeded()
    recorder = Recorder()
    run = fit(
        Delicate(),
        callbacks,
        logger=recorder,
        train=loader(24, shuffle=True),
        val=loader(6),
        strategy="ddp",
        devices=2,
        accumulate_grad_batches=2,
        **settings,
    )
    return run, recorder


def main(folder, monitored):
    synchronized = Synchronized()
    first, recorder = train([*callbacks(monitored), synchronized], max_epochs=2)
    first.trainer.save_checkpoint(folder / f"{monitored}.ckpt")
    found = {"trace": first.trace() | {"logged": recorder.trained()}}
    found["measured"] = recorder.measured()
    found["text"] = synchronized.text
    path = folder / f"{monitored}.ckpt"
    _, recorder = train(callbacks(monitored), max_epochs=3, ckpt_path=path)
    found["resumed"] = recorder.measured()
    rank = first.trainer.global_rank
    torch.save(found, folder / f"{monitored}.{rank}.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]), sys.argv[2] == "with")

"""A script on two processes: `python two_processes.py FOLDER with|without`."""

import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback
from monitored import Delicate, Plain, Recorder, all_monitors, fit, loader, seeded
from torch import nn

from ntk_callbacks import NTKMonitor, NTKOptions, empirical_ntk
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
    return [*all_monitors(every=3, twin=False), broken]


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


class Shared(Plain):
    """Each process takes its part of the same batch."""

    def training_step(self, batch, batch_idx):
        part = slice(self.global_rank, None, self.trainer.world_size)
        return super().training_step([tensor[part] for tensor in batch], batch_idx)


def plain(**settings):
    """In double precision and in order, on any number of processes."""
    seeded()
    recorder = Recorder()
    run = fit(
        Shared(),
        all_monitors(every=3, twin=False),
        logger=recorder,
        train=loader(24, batch_size=6),
        use_distributed_sampler=False,
        precision="64-true",
        max_epochs=2,
        **settings,
    )
    metrics = {tag: float(v) for tag, v in run.trainer.callback_metrics.items()}
    return {"measured": recorder.measured(), "metrics": metrics}


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
    if monitored:
        found["plain"] = plain(strategy="ddp", devices=2)
    rank = first.trainer.global_rank
    torch.save(found, folder / f"{monitored}.{rank}.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]), sys.argv[2] == "with")

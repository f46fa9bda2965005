"""What `test_on_a_device.py` runs in a process of its own; prints JSON."""

import copy
import json
import sys

import numpy as np
import torch
from cases import BY_ID
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from pretend_device import DEVICE, far, moved, pretended, register
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ntk_callbacks import (
    FeatureMonitor,
    JacobianMonitor,
    LinearizationMonitor,
    NTKMonitor,
    NTKOptions,
    ParameterDriftMonitor,
    PredictionMonitor,
    Probe,
    SignalMonitor,
    empirical_ntk,
    load_history,
    plan_ntk,
)
from ntk_callbacks.nested import map_tensors

X = torch.randn(36, 1, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(36) % 3


def kernels(name):
    """Errors of the kernels of a case, device against CPU, and what went to the CPU."""
    case = BY_ID[name]
    model, x = case.build()
    errors, taken = {}, {}
    for outputs in ("full", "trace"):
        settings = {"mode": case.mode, "output_fn": case.output_fn, "outputs": outputs}
        near = empirical_ntk(model, x, route="rows", **settings)
        with pretended():
            there = far(copy.deepcopy(model))
            x_there = map_tensors(lambda t: t.to(DEVICE), x)
            plan = plan_ntk(there, x_there, **settings)
            moved.clear()
            found = empirical_ntk(there, x_there, route=plan, **settings)
        taken |= moved  # what planning took before is no part of it
        assert found.device == DEVICE
        error = torch.linalg.vector_norm(found.near - near)
        errors[outputs] = float(error / torch.linalg.vector_norm(near))
    return {"errors": errors, "moved": taken}


class Network(LightningModule):
    """Convolution, BatchNorm, dropout: what behaves differently in training."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(144, 16), nn.Dropout(0.1), nn.ReLU()),
            nn.Linear(16, 3),
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


class Pretended(Accelerator):
    """The device as Lightning wants to see it."""

    def setup_device(self, device):
        pass

    def get_device_stats(self, device):
        return {}

    def teardown(self):
        pass

    @staticmethod
    def parse_devices(devices):
        return [0]

    @staticmethod
    def get_parallel_devices(devices):
        return [DEVICE]

    @staticmethod
    def auto_device_count():
        return 1

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def name():
        return "pretended"


def monitors():
    """All of them, with their details."""
    common = {"probe": 12, "every": 2, "on_error": "raise"}
    train = NTKOptions(mode="train")
    return [
        NTKMonitor(metrics="all", by="module", **common),
        NTKMonitor(name="train", outputs="trace", options=train, **common),
        NTKMonitor(name="products", outputs="matrix-free", **common),
        ParameterDriftMonitor(every=2, on_error="raise"),
        JacobianMonitor(by="depth", per_layer=True, **common),
        SignalMonitor(per_layer=True, **common),
        PredictionMonitor(per_class=True, **common),
        LinearizationMonitor(twin=True, held_out=Probe(X[24:], Y[24:]), **common),
        FeatureMonitor(per_layer=True, **common),
    ]


def trained(folder, there):
    """History of a run on the CPU, or there."""
    seed_everything(0, verbose=False)
    accelerator = Pretended() if there else None
    strategy = SingleDeviceStrategy(DEVICE if there else "cpu", accelerator)
    trainer = Trainer(
        strategy=strategy,
        max_steps=4,
        callbacks=monitors(),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    model = Network()
    if there:
        model.cpu = lambda: model  # at the end of a run, for the user
    trainer.fit(model, DataLoader(TensorDataset(X, Y), batch_size=12))
    return load_history(folder)


def runs():
    """Tags with their numbers, on the CPU and on the device, and what left it."""
    near = trained("near", there=False)
    with pretended():
        moved.clear()
        there = trained("far", there=True)
    return {"near": numbers(near), "far": numbers(there), "moved": dict(moved)}


def numbers(history):
    """All but what the clock says."""
    return {
        tag: np.concatenate([np.ravel(v).astype(float) for v in series.values]).tolist()
        for tag, series in history.items()
        if "seconds" not in tag
    }


if __name__ == "__main__":
    register()
    names = sys.argv[1:]
    found = {name: kernels(name) for name in names} if names else runs()
    print(json.dumps(found))

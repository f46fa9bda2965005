"""Small training runs, and everything about them that a monitor must not change."""

import random
from dataclasses import dataclass
from typing import Any

import lightning.pytorch
import numpy as np
import pytorch_lightning
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from ntk_callbacks import (
    FeatureMonitor,
    JacobianMonitor,
    LinearizationMonitor,
    NTKMonitor,
    ParameterDriftMonitor,
    PredictionMonitor,
    SignalMonitor,
)

PREFIXES = (
    *("ntk_modes/", "ntk/", "ntk_modules/", "params/", "params_tensors/", "jacobian/"),
    *("features/", "features_layers/"),
    *("jacobian_layers/", "jacobian_time/"),
    *("prediction/", "prediction_classes/", "signal/", "signal_layers/", "linear/"),
)


class Recorder(Logger):
    """Keeps what it is given; a logger of its own, not a stand-in for one."""

    def __init__(self):
        super().__init__()
        self.rows = []

    @property
    def name(self):
        return "recorder"

    @property
    def version(self):
        return 0

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def steps(self, tag):
        """The step of every row that holds the tag, in the order of logging."""
        return [step for step, row in self.rows if tag in row]

    def measured(self):
        """Step -> what monitors logged there; fails if a tag comes twice."""
        found = {}
        for step, row in self.rows:
            for tag, value in row.items():
                if tag.startswith(PREFIXES):
                    assert tag not in found.setdefault(step, {}), (step, tag)
                    found[step][tag] = value
        return found

    def trained(self):
        """What the training itself logged."""
        return [
            (step, row)
            for step, row in self.rows
            if not any(tag.startswith(PREFIXES) for tag in row)
        ]


class Steps:
    """The training step of a classifier, for either Lightning namespace."""

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = cross_entropy(self(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


def smooth_net():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


class Ascending(torch.optim.SGD):
    """As sharpness-aware minimization: by the gradient a small step uphill."""

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
            held = [p for group in self.param_groups for p in group["params"]]
            before = [p.clone() for p in held]
            for p in held:
                p += 0.05 * p.grad
            with torch.enable_grad():
                closure()
            for p, start in zip(held, before, strict=True):
                p.copy_(start)
        return super().step()


class Plain(Steps, lightning.pytorch.LightningModule):
    """A network without chance or buffers."""

    def __init__(self, net=None):
        super().__init__()
        self.net = net or smooth_net()


class OtherPlain(Steps, pytorch_lightning.LightningModule):
    """The same for the other namespace."""

    def __init__(self, net=None):
        super().__init__()
        self.net = net or smooth_net()


class Validated(Plain):
    """The same with a validation loop."""

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", cross_entropy(self(x), y))


class Delicate(Validated):
    """Whatever a careless measurement disturbs: dropout, BatchNorm, a frozen layer."""

    def __init__(self):
        net = nn.Sequential(
            *(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True)),
            *(nn.Dropout(0.4), nn.Linear(4, 2), nn.BatchNorm1d(2)),
        )
        # Far from the statistics of a batch: training this layer would show.
        nn.init.constant_(net[5].running_mean, 0.5)
        nn.init.constant_(net[5].running_var, 4.0)
        super().__init__(net)

    def train(self, mode=True):
        super().train(mode)
        self.net[5].eval()
        return self

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = x + 0.1 * random.random() + 0.1 * float(np.random.rand())  # noqa: NPY002
        return super().training_step((x, y), batch_idx)

    def validation_step(self, batch, batch_idx):
        # A user's own gradient inside validation, where Lightning turns them off.
        x, y = batch
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(self(x).sum(), x)
        self.log("val_slope", slope.norm())
        super().validation_step((x.detach(), y), batch_idx)


def examples(n=12, classes=2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, generator=generator)
    return TensorDataset(x, torch.arange(n) % classes)


def loader(n=12, batch_size=3, **settings):
    return DataLoader(examples(n), batch_size=batch_size, **settings)


MONITORS = {
    "ntk": lambda every, probe: NTKMonitor(probe, every, on_error="raise"),
    "drift": lambda every, probe: ParameterDriftMonitor(every, on_error="raise"),
    "jacobian": lambda every, probe: JacobianMonitor(probe, every, on_error="raise"),
    "signal": lambda every, probe: SignalMonitor(probe, every, on_error="raise"),
    "features": lambda every, probe: FeatureMonitor(probe, every, on_error="raise"),
    "prediction": lambda every, probe: PredictionMonitor(
        probe, every, on_error="raise"
    ),
    "linear": lambda every, probe: LinearizationMonitor(probe, every, on_error="raise"),
    "twin": lambda every, probe: LinearizationMonitor(
        probe, every, twin=True, on_error="raise"
    ),
}


def all_monitors(every=2, probe=4, *, twin=True):
    """One of each kind; the twin needs automatic optimization on one process."""
    left_out = "linear" if twin else "twin"
    return [make(every, probe) for name, make in MONITORS.items() if name != left_out]


def three_monitors(every=2, probe=4):
    """Where another monitor would tell nothing new."""
    return [MONITORS[name](every, probe) for name in ("ntk", "drift", "jacobian")]


@dataclass
class Run:
    """What a fit leaves behind."""

    model: Any
    trainer: Any
    recorder: Recorder
    generators: tuple

    def trace(self):
        """Everything that must be the same with and without monitors."""
        return {
            "weights": copied(self.model.state_dict()),
            "requires_grad": [p.requires_grad for p in self.model.parameters()],
            "training": [part.training for part in self.model.modules()],
            "optimizers": [copied(o.state_dict()) for o in self.trainer.optimizers],
            "generators": self.generators,
            "logged": self.recorder.trained(),
            "step": self.trainer.global_step,
            "epoch": self.trainer.current_epoch,
        }


def seeded(seed=3):
    """The same chance again."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def generator_states():
    name, key, *rest = np.random.get_state()  # noqa: NPY002
    return random.getstate(), (name, key.tolist(), *rest), torch.get_rng_state()


def copied(state):
    """A nested state with tensors detached from what they were."""
    if isinstance(state, torch.Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(copied(value) for value in state)
    return state


def same(left, right, where=""):
    """Assert equality to the last bit; NaN equals NaN; says where it ends."""
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, where
        assert torch.equal(left.nan_to_num(7.25), right.nan_to_num(7.25)), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            same(left[key], right[key], f"{where}/{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for index, pair in enumerate(zip(left, right, strict=True)):
            same(*pair, f"{where}/{index}")
    else:
        assert left == right or (left != left and right != right), where


class FloatPrecision(MixedPrecision):
    """A scaler as for half precision, which products on a CPU need not have."""

    def autocast_context_manager(self):
        return torch.autocast("cpu", enabled=False)


QUIET = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
}


def fit(
    model,
    callbacks=(),
    *,
    train=None,
    val=None,
    logger=None,
    kind=Trainer,
    ckpt_path=None,
    **settings,
):
    """One fit on the CPU; `logger=None` records, everything else goes to Lightning."""
    recorder = Recorder()
    settings = QUIET | {"max_epochs": 2} | settings
    if "max_steps" in settings:
        settings["max_epochs"] = -1
    trainer = kind(
        callbacks=callbacks if not isinstance(callbacks, tuple) else list(callbacks),
        logger=recorder if logger is None else logger,
        **settings,
    )
    train = loader() if train is None else train
    trainer.fit(model, train, val, ckpt_path=ckpt_path)
    return Run(model, trainer, recorder, generator_states())

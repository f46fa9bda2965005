"""A `forward` that logs, counts or draws by itself: a measurement leaves no trace."""

import random
from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from monitored import loader, same
from torch import nn

from ntk_callbacks import JacobianMonitor, NTKMonitor, NTKOptions


class Stateful(LightningModule):
    """Plain, but for what `forward` does on the side."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x):
        return self.net(x) * (1 + 0.01 * self.beside())

    def beside(self):
        return 0.0

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Logs(Stateful):
    def forward(self, x):
        y = self.net(x)
        self.log("beside", y.detach().abs().mean())
        self.log_dict({"mean": y.detach().mean()}, on_step=False, on_epoch=True)
        return y


class TorchGenerator(Stateful):
    def __init__(self):
        super().__init__()
        self.own = torch.Generator().manual_seed(1)

    def beside(self):
        return float(torch.rand((), generator=self.own))


class PythonGenerator(Stateful):
    def __init__(self):
        super().__init__()
        self.own = random.Random(1)

    def beside(self):
        return self.own.random()


class NumpyGenerator(Stateful):
    def __init__(self):
        super().__init__()
        self.own = {"generators": [np.random.default_rng(1)]}

    def beside(self):
        return float(self.own["generators"][0].random())


class Arrays(Stateful):
    def __init__(self):
        super().__init__()
        self.array = np.zeros(2)

    def beside(self):
        self.array += 1
        return float(self.array[0])


@dataclass
class Counted:
    calls: int = 0


class Records(Stateful):
    def __init__(self):
        super().__init__()
        self.one, self.two = SimpleNamespace(calls=0), Counted()

    def beside(self):
        self.one.calls += 1
        self.two.calls += 2
        return self.one.calls + self.two.calls


class Memory(Stateful):
    def __init__(self):
        super().__init__()
        self.bank = {"recent": deque([torch.zeros(2)], maxlen=3), "all": [[0]]}

    def beside(self):
        self.bank["recent"][0].add_(1)
        self.bank["all"][0].append(len(self.bank["all"][0]))
        return float(self.bank["recent"][0][0]) + len(self.bank["all"][0])


def trained(kind, monitors):
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 the global generator is what must not move
    random.seed(0)
    model = kind()
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        callbacks=monitors,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader())
    # What monitors measured stands there too, for callbacks that ask for it.
    logged = {k: v for k, v in trainer.callback_metrics.items() if "/" not in k}
    metrics = {name: float(value) for name, value in logged.items()}
    return model.state_dict(), metrics


KINDS = [Logs, TorchGenerator, PythonGenerator, NumpyGenerator, Arrays, Records, Memory]


@pytest.mark.parametrize("route", ["auto", "rows"])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_with_a_state_of_its_own(kind, route):
    # Their outputs change from call to call, so most of these are refused: that too
    # must leave no trace. Those that only log are measured.
    options = NTKOptions(route=route)
    monitors = [NTKMonitor(4, 1, options=options), JacobianMonitor(4, 1)]
    plain_weights, plain_metrics = trained(kind, [])
    if kind is Logs:
        for monitor in monitors:
            monitor.on_error = "raise"
        weights, metrics = trained(kind, monitors)
        assert plain_metrics.keys() == {"beside", "mean"}
        assert all(len(monitor.history) > 2 for monitor in monitors)
    else:
        first, second = "draws random numbers", "for the same reason as NTKMonitor's"
        with pytest.warns(UserWarning, match=f"{first}|{second}") as warned:
            weights, metrics = trained(kind, monitors)
        assert any(first in str(warning.message) for warning in warned)
    same(weights, plain_weights)
    assert metrics == plain_metrics

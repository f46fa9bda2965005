"""Modules and data that cannot be measured as they are, and what is said of them."""

import re

import pytest
import torch
from lightning.pytorch import LightningModule
from monitored import Plain, fit, same, seeded
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset


def warned(make_model, make_monitor, **settings):
    """Texts of our warnings; checks that the run ends as one without the monitor."""
    seeded()
    monitor = make_monitor()
    with pytest.warns(UserWarning, match=type(monitor).__name__) as caught:
        run = fit(make_model(), [monitor], **settings)
    seeded()
    bare = fit(make_model(), **settings)
    same(run.trace(), bare.trace())
    texts = [str(warning.message) for warning in caught]
    return run, [text for text in texts if type(monitor).__name__ in text]


def refused(make_model, make_monitor, what, **settings):
    """The text of the one warning of a monitor that stepped aside at once."""
    run, (text,) = warned(make_model, make_monitor, **settings)
    assert re.search(what, text), text
    assert "off for the rest of this run; training goes on" in text
    assert "step 0" in text
    assert not run.recorder.measured()
    return text


class Tokens(Plain):
    """Integer inputs."""

    def __init__(self):
        super().__init__(
            nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2))
        )


def token_loader():
    data = TensorDataset(torch.arange(24).reshape(12, 2) % 5, torch.arange(12) % 2)
    return DataLoader(data, batch_size=3)


class TwoResults(Plain):
    """`forward` returns a tuple of two tensors."""

    def forward(self, x):
        h = self.net[0](x)
        return self.net[1:](h), h

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0])[0], batch[1])


class NoForward(Plain):
    """Everything happens in `training_step`."""

    forward = LightningModule.forward

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch[0]), batch[1])


class TwoLoaders(Plain):
    def training_step(self, batch, batch_idx):
        if isinstance(batch, dict):
            batch = batch["first"]
        return cross_entropy(self(batch[0]), batch[1])

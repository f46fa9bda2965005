"""A probe to predict on, and a network whose optimizer is under way."""

import torch
from instrumented import LABELS, batch
from torch.nn.functional import cross_entropy

from ntk_callbacks import Probe


def probe(targets=LABELS):
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(5, 3, dtype=torch.float64, generator=generator)
    return Probe(x, targets)


def trained(net, optimizer, steps=3):
    """A few steps, so that moments and momentum are there; then a gradient."""
    for step in range(steps + 1):
        optimizer.zero_grad()
        x, y = batch(step)
        cross_entropy(net(x), y).backward()
        if step < steps:
            optimizer.step()

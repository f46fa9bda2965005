"""Linearized networks: an oracle, a network with statistics, a look inside."""

import torch
from instrumented import flat
from torch import nn


def normalized(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    ).double()


def jacobian_by_rows(net, x):
    """∂f/∂θ of the joint batch, (n·c, p), one output after the other."""
    outputs = net(x).reshape(-1)
    weights = [*net.parameters()]
    rows = [
        flat(torch.autograd.grad(output, weights, retain_graph=True))
        for output in outputs
    ]
    return torch.stack(rows)


def measured(instrument, net, step=1):
    return {
        tag.removeprefix("linear/"): value
        for tag, value in instrument.measure(net, step).scalars.items()
    }

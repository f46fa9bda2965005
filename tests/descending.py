"""Linear networks that `SGD` descends, and their residual in modes of the kernel."""

import numpy as np
import torch
from torch import nn

from ntk_callbacks import NTKOptions, Probe
from ntk_callbacks.instruments.kernel import KernelInstrument

N, D = 12, 14
RNG = np.random.default_rng(8)
X = torch.tensor(RNG.standard_normal((N, D)))
Y = torch.tensor(RNG.standard_normal((N, 1)))
PROBE = Probe(X, Y)
SETTINGS = [
    {"momentum": 0.9},
    {"momentum": 0.6, "nesterov": True},
    {"momentum": 0.8, "dampening": 0.7},
]
EXACT = {"rel": 1e-8, "abs": 1e-10}


def half_mean(f, y):
    return (f - y).square().sum() / (2 * len(f))


def linear():
    return nn.Linear(D, 1).double()


def watching(optimizer, probe=PROBE, loss="half_mean", **options):
    instrument = KernelInstrument(
        metrics=["residual_modes"], options=NTKOptions(loss=loss, **options)
    )
    instrument.optimizers = [optimizer]
    instrument.start(probe)
    return instrument


def update(net, sgd, probe=PROBE, loss_fn=half_mean, share=1.0):
    sgd.zero_grad()
    loss_fn(net(probe.inputs), probe.targets).backward()
    for parameter in net.parameters():
        if parameter.grad is not None:
            parameter.grad *= share
    sgd.step()


def decays(what, scalars):
    return np.array([scalars[f"ntk_modes/decay_{what}/{k}"] for k in range(1, 9)])


def residual_along(net, directions):
    with torch.no_grad():
        return directions.T @ (net(X) - Y).numpy()[:, 0]


def top_modes(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return values[::-1][:8].copy(), vectors[:, ::-1][:, :8].copy()


def set_velocity(net, sgd):
    """Buffers that no gradient of this probe has to do with."""
    generator = torch.Generator().manual_seed(3)
    for parameter in net.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        sgd.state[parameter]["momentum_buffer"] = noise.to(parameter)

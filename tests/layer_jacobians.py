"""Jacobians between layers by hand, and comparisons with their singular values."""

import torch
from torch import nn
from torch.nn import functional

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def close(left, right):
    torch.testing.assert_close(left, right, **CLOSE)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.ReLU(inplace=True)),
        nn.Linear(6, 3),
    ).double()


def x_of(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def by_hand(net, x):
    """The three weights and the slopes of the activations, no derivative taken."""
    weights = [net[i].weight.detach() for i in (0, 2, 4)]
    with torch.no_grad():
        h1 = functional.linear(x, weights[0], net[0].bias)
        h2 = functional.linear(h1.tanh(), weights[1], net[2].bias)
    return (
        weights,
        torch.diag_embed(1 - h1.tanh() ** 2),
        torch.diag_embed((h2 > 0).double()),
    )


def s_of(matrices):
    s = torch.linalg.svdvals(matrices)
    return s.square().mean(1), s[:, 0], s[:, -1]


def agree(spectra, matrices):
    for found, expected in zip(
        (spectra.mean_square, spectra.largest, spectra.smallest),
        zip(*(s_of(m) for m in matrices), strict=True),
        strict=True,
    ):
        close(found, torch.stack(expected))

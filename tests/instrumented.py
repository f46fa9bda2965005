"""A small network in float64, inputs and labels for it."""

import torch
from torch import nn

LABELS = torch.tensor([0, 2, 1, 1, 0])


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def inputs(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, dtype=torch.float64, generator=generator)


def batch(seed):
    return inputs(4, seed), torch.tensor([0, 1, 2, 2])


def flat(tensors):
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])

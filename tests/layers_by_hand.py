"""A network, its inputs and its forward pass, layer by layer by hand."""

from itertools import pairwise, product

import numpy as np
import torch
from torch import nn


def mlp(*widths, gate=nn.ReLU, seed=0):
    torch.manual_seed(seed)
    parts = []
    for d, width in pairwise(widths):
        parts += [nn.Linear(d, width), gate()]
    return nn.Sequential(*parts[:-1]).double()


def inputs(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def array(tensor):
    return tensor.detach().numpy().copy()


def by_hand(net, x):
    """Pre- and post-activations of a ReLU MLP, by loops over units."""
    layers = [part for part in net if isinstance(part, nn.Linear)]
    h, before, after = array(x), [], []
    for layer in layers[:-1]:
        w, b = array(layer.weight), array(layer.bias)
        z = np.empty((len(h), len(w)))
        for i, k in product(range(len(h)), range(len(w))):
            z[i, k] = b[k] + sum(w[k, j] * h[i, j] for j in range(w.shape[1]))
        h = np.where(z > 0, z, 0.0)
        before.append(z)
        after.append(h)
    return before, after


class ByHand(nn.Module):
    """Weights without layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.ones(4, 3))
        self.last = nn.Parameter(torch.ones(2, 4))

    def forward(self, x):
        return (x @ self.first.T).relu() @ self.last.T

"""Maps whose singular values are known on paper, and what is measured of them."""

import torch
from torch import nn

from ntk_callbacks import Probe
from ntk_callbacks.instruments.jacobian import JacobianInstrument

CLOSE = {"rel": 1e-12, "abs": 1e-14}


class Map(nn.Module):
    """x -> A x."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor(matrix, dtype=torch.float64))

    def forward(self, x):
        return x.flatten(1) @ self.matrix.mT


def measured(net, x=None, **settings):
    instrument = JacobianInstrument(**settings)
    instrument.start(Probe(torch.randn(3, 4).double() if x is None else x))
    return instrument.measure(net, 7)

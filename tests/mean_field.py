"""Networks to measure signals of, and maps of their depth by the trapezoidal rule."""

import math
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from ntk_callbacks import Probe
from ntk_callbacks.instruments.signal import SignalInstrument

CLOSE = {"rel": 1e-9, "abs": 1e-12}

PLAIN = {"q_first", "q_last", "c_first", "c_last", "chi", "xi_q", "xi_c"}

THEORY = {
    *("q_mean_field_error", "c_mean_field_error"),
    *("xi_q_mean_field", "xi_c_mean_field"),
}


def measured(net, x, targets=None, **settings):
    instrument = SignalInstrument(**settings)
    instrument.start(Probe(x, targets))
    return instrument.measure(net, 7)


def names(found, group="signal"):
    return {tag.removeprefix(f"{group}/") for tag in found.scalars}


def network(*widths, activation=nn.Tanh, scale=1.5, bias=0.0, orthogonal=False, seed=0):
    """Layers with a given √(fan_in ⟨W²⟩) and |b|, exactly so where orthogonal."""
    torch.manual_seed(seed)
    parts = []
    for d, width in pairwise(widths):
        layer = nn.Linear(d, width).double()
        if orthogonal:
            nn.init.orthogonal_(layer.weight, gain=scale)
        else:
            nn.init.normal_(layer.weight, std=scale / d**0.5)
        signs = torch.randint(2, (width,)) * 2.0 - 1
        layer.bias.data.copy_(bias * signs)
        parts += [layer, activation()]
    return nn.Sequential(*parts[:-1])


# The trapezoidal rule: exact to round-off for functions this smooth.
NODES = np.linspace(-9, 9, 601)

WEIGHTS = np.exp(-(NODES**2) / 2) / np.exp(-(NODES**2) / 2).sum()


def expectation(phi, q1, q2, q12):
    """E φ(u) φ(v) on a fine grid of independent normal numbers."""
    rho = q12 / math.sqrt(q1 * q2)
    u = math.sqrt(q1) * NODES
    v = math.sqrt(q2) * (rho * NODES[:, None] + math.sqrt(1 - rho**2) * NODES)
    return float(WEIGHTS @ (phi(u)[:, None] * phi(v)) @ WEIGHTS)

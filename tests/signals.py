"""Inputs and a network for signals by depth, and a correlation written out."""

import math
from itertools import pairwise

import numpy as np
import torch
from torch import nn

RNG = np.random.default_rng(5)

X = RNG.standard_normal((4, 5))

CLOSE = {"rel": 1e-10, "abs": 1e-13}


def mlp(*widths, activation=nn.Tanh):
    torch.manual_seed(0)
    parts = []
    for d, width in pairwise(widths):
        parts += [nn.Linear(d, width), activation()]
    return nn.Sequential(*parts[:-1]).double()


def mean_cosine(h):
    h = h.reshape(len(h), -1)
    found = []
    for i in range(len(h)):
        for j in range(i):
            norm = math.sqrt((h[i] @ h[i]) * (h[j] @ h[j]))
            found.append((h[i] @ h[j]) / norm)
    return np.mean(found)

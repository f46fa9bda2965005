"""The edge of networks whose units are on or off, and finite networks."""

import torch
from torch import nn

from ntk_callbacks import input_singular_values


def bernoulli_edge(p, depth):
    """s_max² of orthogonal layers that let a share p of units through, σ_w² p = 1."""
    z = p / (depth * (1 - p) - 1)
    return 1 / (p**depth * z * (1 + z) ** (depth - 1) / (z + p) ** depth)


def haar(gaussian):
    """A uniform orthogonal matrix: the signs that qr leaves are not uniform.

    Mezzadri 2007, arXiv:math-ph/0609050. Its diagonal would be negative on average, and
    ReLU would let fewer than half of the units through.
    """
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal().sign()


def network(depth, n, activation, point, weights, generator):
    """Layers φ(·) then W, b, so that the input is the first pre-activation."""
    layers = []
    for _ in range(depth):
        linear = nn.Linear(n, n, dtype=torch.float64)
        w = torch.randn(n, n, dtype=torch.float64, generator=generator)
        w = haar(w) if weights == "orthogonal" else w / n**0.5
        b = torch.randn(n, dtype=torch.float64, generator=generator)
        linear.weight.data, linear.bias.data = point.sigma_w * w, point.sigma_b * b
        layers += [activation(), linear]
    return nn.Sequential(*layers)


def measured(depth, activation, point, weights, *, n=400, seeds=6):
    """Mean, variance over mean², and largest s² of each seed."""
    found = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        net = network(depth, n, activation, point, weights, generator)
        x = torch.randn(1, n, dtype=torch.float64, generator=generator)
        squares = input_singular_values(net, point.q.sqrt() * x)[0] ** 2
        mean = squares.mean()
        spread = squares.var(unbiased=False) / mean**2
        found.append(torch.stack([mean, spread, squares.max()]))
    return torch.stack(found)

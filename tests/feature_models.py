"""Models linear in their parameters, f = Φ θ, whose kernel is Φ Φᵀ for good."""

import torch
from torch import nn


class FeatureModel(nn.Module):
    """f_k(xᵢ) = φ(i, k) · θ; the inputs are the features, (n, c, p)."""

    def __init__(self, p):
        super().__init__()
        self.theta = nn.Parameter(torch.randn(p, dtype=torch.float64))

    def forward(self, features):
        return features @ self.theta


def features(n, c, p):
    """Random features of a size that gives eigenvalues of order 1."""
    return torch.randn(n, c, p, dtype=torch.float64) / p**0.5


def kernel(first, second):
    """Θ[i, j, k, l] = φ(i, k) · φ(j, l)."""
    return torch.einsum("ikp,jlp->ijkl", first, second)

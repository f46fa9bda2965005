"""Uses of a weight on the way to a contraction, and the definition of its kernel."""

import torch

OUTPUTS = ["full", "trace", "diagonal"]

TOLERANCE = 1e-12  # float64, some hundred terms of size 1

O, C, D = 3, 4, 5  # noqa: E741 - outputs, and the axes of the weight

WORKSPACES = [1, 40, 10**6]  # block by block of one, of some, all at once


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def contracted(j1, j2, outputs):
    """J₁ J₂ᵀ, summed over the outputs for `"trace"`."""
    formula = {
        "full": "kip,ljp->ijkl",
        "trace": "kip,kjp->ij",
        "diagonal": "kip,kjp->ijk",
    }
    return torch.einsum(formula[outputs], j1, j2)

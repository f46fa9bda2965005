"""Spectra of kernel matrices and of Jacobians."""

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_callbacks.layout import widened


def kernel_eigenvalues(matrix: Float[Tensor, "m m"]) -> Float[Tensor, " m"]:
    """Eigenvalues λ of a symmetric kernel matrix, the largest first.

    Computed in float64, so that only the round-off of the kernel itself is left: the
    smallest ones may be slightly negative.

    Args:
        matrix: Symmetric (n·c)×(n·c) matrix; the lower triangle is read.

    Returns:
        All m eigenvalues in float64; NaN if the matrix is not finite.

    Example:
        >>> kernel_eigenvalues(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        tensor([3., 1.], dtype=torch.float64)
    """
    wide = widened(matrix)
    if not wide.isfinite().all():
        return wide.new_full((len(wide),), torch.nan)
    ascending: Tensor = torch.linalg.eigvalsh(wide)
    return ascending.flip(0)


def singular_values(
    jacobian: Float[Tensor, "n c d"],
) -> Float[Tensor, "n r"]:
    """Singular values of each c×d matrix, the largest first, r = min(c, d).

    Args:
        jacobian: One matrix for each example.

    Returns:
        Values ≥ 0 in float64; NaN for the examples whose matrix is not finite.

    Example:
        >>> singular_values(torch.diag(torch.tensor([1.0, 3.0])).expand(1, 2, 2))
        tensor([[3., 1.]], dtype=torch.float64)
    """
    wide = widened(jacobian)
    finite = wide.flatten(1).isfinite().all(1)
    values = wide.new_full((len(wide), min(wide.shape[1:])), torch.nan)
    if finite.any():
        values[finite] = torch.linalg.svdvals(wide[finite])
    return values

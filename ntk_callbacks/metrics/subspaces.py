"""How far a subspace of eigenvectors has turned."""

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_callbacks.layout import widened


def top_directions(matrix: Float[Tensor, "m m"], k: int) -> Float[Tensor, "m k"]:
    """Eigenvectors of the k largest eigenvalues of a symmetric matrix.

    Args:
        matrix: A kernel as a matrix; the lower triangle is read.
        k: Number of eigenvectors, at most m.

    Returns:
        Orthonormal columns in float64, the largest eigenvalue first, each up to its
        sign; NaN if the matrix is not finite.

    Raises:
        ValueError: If k is not in 1 … m.

    Example:
        >>> top_directions(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 2).abs()
        tensor([[0., 0.],
                [1., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    wide = widened(matrix)
    if not 1 <= k <= len(wide):
        raise ValueError(f"top_directions: k={k}; expected 1 … {len(wide)}.")
    if not wide.isfinite().all():
        return wide.new_full((len(wide), k), torch.nan)
    vectors: Tensor = torch.linalg.eigh(wide).eigenvectors
    return vectors[:, -k:].flip(1)


def principal_angles(
    basis: Float[Tensor, "m k"], reference: Float[Tensor, "..."]
) -> Float[Tensor, " k"]:
    """Principal angles between two subspaces of k dimensions.

    With orthonormal columns V and V₀: cos of them are the singular values of V₀ᵀV, sin
    those of V − V₀V₀ᵀV. Both are used, so that small angles keep their digits.

    Args:
        basis: V, orthonormal columns.
        reference: V₀, likewise, m×k.

    Returns:
        Angles in [0, π/2], the smallest first; NaN if an entry is not finite.

    Raises:
        ValueError: If the shapes differ or there are more columns than rows.

    Example:
        >>> turned = torch.tensor([[1.0, 0.0], [0.0, 0.6], [0.0, 0.8]])
        >>> principal_angles(turned, torch.eye(3)[:, :2]).sin()
        tensor([0.0000, 0.8000])

    References:
        Björck, Golub 1973, "Numerical methods for computing angles between linear
        subspaces".
    """
    if basis.shape != reference.shape or basis.shape[0] < basis.shape[1]:
        raise ValueError(
            f"principal_angles: bases of shapes {tuple(basis.shape)} and "
            f"{tuple(reference.shape)}; expected the same m×k, k ≤ m."
        )
    if not (basis.isfinite().all() and reference.isfinite().all()):
        return basis.new_full((basis.shape[1],), torch.nan)
    inner = reference.mT @ basis
    cosines = torch.linalg.svdvals(inner)
    sines = torch.linalg.svdvals(basis - reference @ inner)
    return torch.atan2(sines.flip(0), cosines)


def subspace_overlap(
    basis: Float[Tensor, "m k"], reference: Float[Tensor, "..."]
) -> Float[Tensor, ""]:
    """Mean squared cosine of the principal angles, ‖V₀ᵀV‖²_F / k.

    Args:
        basis: V, orthonormal columns.
        reference: V₀, likewise, m×k.

    Returns:
        Value in [0, 1]: 1 for the same subspace, 0 for orthogonal ones, k/m on average
        for random ones.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> subspace_overlap(torch.eye(4)[:, :2], torch.eye(4)[:, 1:3])
        tensor(0.5000)

    References:
        Gur-Ari, Roberts, Dyer 2018, arXiv:1812.04754 (overlap of top eigenspaces).
    """
    if basis.shape != reference.shape:
        raise ValueError(
            f"subspace_overlap: bases of shapes {tuple(basis.shape)} and "
            f"{tuple(reference.shape)}; expected the same m×k."
        )
    return (reference.mT @ basis).square().sum() / basis.shape[1]

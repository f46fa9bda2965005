"""How far a subspace of eigenvectors has turned."""

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_callbacks.layout import widened
from ntk_callbacks.metrics.checks import real

_ROUND_OFF = 1e-2  # of squared lengths and inner products in bfloat16


def top_directions(matrix: Float[Tensor, "m m"], k: int) -> Float[Tensor, "m k"]:
    """Eigenvectors of the k largest eigenvalues of a symmetric matrix.

    Args:
        matrix: A kernel as a matrix; the lower triangle is read.
        k: Number of eigenvectors, at most m.

    Returns:
        Orthonormal columns in float64, the largest eigenvalue first, each up to its
        sign; NaN if the matrix is not finite.

    Raises:
        ValueError: If the matrix is not m×m, or k not in 1 … m.

    Example:
        >>> top_directions(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 2).abs()
        tensor([[0., 0.],
                [1., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(
            f"top_directions: a matrix of shape {tuple(matrix.shape)}; expected "
            "(m, m). Pass as_matrix(ntk)."
        )
    wide = widened(real("top_directions", matrix))
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
        ValueError: If the shapes differ, or the columns are not orthonormal.

    Example:
        >>> turned = torch.tensor([[1.0, 0.0], [0.0, 0.6], [0.0, 0.8]])
        >>> principal_angles(turned, torch.eye(3)[:, :2]).sin()
        tensor([0.0000, 0.8000])

    References:
        Björck, Golub 1973, "Numerical methods for computing angles between linear
        subspaces".
    """
    basis, reference = _bases("principal_angles", basis, reference)
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
        ValueError: If the shapes differ, or the columns are not orthonormal.

    Example:
        >>> subspace_overlap(torch.eye(4)[:, :2], torch.eye(4)[:, 1:3])
        tensor(0.5000)

    References:
        Gur-Ari, Roberts, Dyer 2018, arXiv:1812.04754 (overlap of top eigenspaces).
    """
    basis, reference = _bases("subspace_overlap", basis, reference)
    mean = (reference.mT @ basis).square().sum() / basis.shape[1]
    return mean.clamp(max=1.0)


def _bases(who: str, basis: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype."""
    shape = tuple(basis.shape)
    if basis.shape != reference.shape or len(shape) != 2 or shape[0] < shape[1]:
        raise ValueError(
            f"{who}: bases of shapes {shape} and {tuple(reference.shape)}; expected "
            "the same m×k, k ≤ m."
        )
    dtype = torch.promote_types(basis.dtype, reference.dtype)
    pair = real(who, basis.to(dtype)), real(who, reference.to(dtype))
    for columns in pair:
        off = (columns.mT @ columns - torch.eye(shape[1]).to(columns)).abs()
        if (off > _ROUND_OFF).any():
            raise ValueError(
                f"{who}: columns that are not orthonormal; VᵀV is off 1 by "
                f"{off.max():.2g}. Pass an orthonormal basis of what they span, "
                "torch.linalg.qr(basis).Q."
            )
    return pair

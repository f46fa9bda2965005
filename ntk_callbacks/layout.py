"""How kernels are laid out: with output axes `(n1, n2, c, c)`, or as a matrix."""

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_callbacks._types import Kernel


def as_matrix(ntk: Kernel) -> Float[Tensor, "rows columns"]:
    """A kernel as the matrix J₁ J₂ᵀ, rows and columns example-major.

    Args:
        ntk: `(n1, n2, c, c)`; `(n1, n2, c)`, read as block-diagonal in the outputs; or
            `(n1, n2)`, returned as it is.

    Returns:
        Matrix (n1·c)×(n2·c); entry (i·c + k, j·c + l) is Θ[i, j, k, l].

    Raises:
        ValueError: If the shape is none of these.

    Example:
        >>> as_matrix(torch.eye(2).expand(3, 3, 2, 2)).shape
        torch.Size([6, 6])
    """
    if ntk.ndim == 2:
        return ntk
    if ntk.ndim == 3:
        ntk = torch.diag_embed(ntk)
    if ntk.ndim != 4 or ntk.shape[2] != ntk.shape[3]:
        raise ValueError(
            f"as_matrix: a kernel of shape {tuple(ntk.shape)}; expected "
            "(n1, n2, c, c), (n1, n2, c) or (n1, n2)."
        )
    n1, n2, c, _ = ntk.shape
    return ntk.transpose(1, 2).reshape(n1 * c, n2 * c)


def symmetric(kernel: Kernel) -> Kernel:
    """The upper triangle and its mirror image: symmetric to the last bit."""
    if kernel.ndim == 4:
        rows = kernel.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        return symmetric_(rows.transpose(1, 2))
    return symmetric_(kernel.clone(memory_format=torch.contiguous_format))


def symmetric_(kernel: Kernel) -> Kernel:
    """`symmetric` in place, for a kernel that lies in memory as its matrix does."""
    if kernel.ndim == 4:
        rows = kernel.transpose(1, 2)
        mirror_(rows.view(rows.shape[0] * rows.shape[1], -1))
    else:
        mirror_(kernel if kernel.ndim == 2 else kernel.permute(2, 0, 1))
    return kernel


def mirror_(matrix: Float[Tensor, "*batch n n"], size: int = 256) -> None:
    """Copy the upper triangle to the lower one, some rows at a time.

    Args:
        matrix: Changed in place.
        size: Rows at a time: as many as stay in a cache.
    """
    for start in range(0, matrix.shape[-1], size):
        rows = slice(start, start + size)
        block = matrix[..., rows, rows]
        block.copy_(block.triu() + block.triu(1).mT)
        below = slice(start + size, None)
        matrix[..., below, rows] = matrix[..., rows, below].mT


def widened(tensor: Tensor) -> Tensor:
    """The same numbers in float64, on the CPU where the device has no float64."""
    if tensor.device.type == "mps":
        tensor = tensor.cpu()
    return tensor.double()

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
    n = kernel.shape[0]
    if kernel.ndim == 4:
        c = kernel.shape[-1]
        matrix = kernel.transpose(1, 2).reshape(n * c, n * c)
        matrix = matrix.triu() + matrix.triu(1).mT
        return matrix.view(n, c, n, c).transpose(1, 2)
    batched = kernel if kernel.ndim == 2 else kernel.permute(2, 0, 1)
    batched = batched.triu() + batched.triu(1).mT
    return batched if kernel.ndim == 2 else batched.permute(1, 2, 0)


def widened(tensor: Tensor) -> Tensor:
    """The same numbers in float64, on the CPU where the device has no float64."""
    if tensor.device.type == "mps":
        tensor = tensor.cpu()
    return tensor.double()

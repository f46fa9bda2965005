"""The kernel weighted by the curvature of the loss: the Gauss-Newton matrix's twin."""

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_callbacks.dynamics.losses import LossName, loss_named
from ntk_callbacks.layout import as_matrix, widened


def curvature_factor(
    f: Float[Tensor, "n c"], *, loss: LossName = "mse"
) -> Float[Tensor, "n c c"]:
    """B with B Bᵀ = H, the Hessian of the loss by the outputs of each example.

    1 for ½ Σ (f − y)². For cross-entropy with p = softmax(f), H = diag(p) − p pᵀ does
    not depend on the target, and B = diag(√p) (1 − √p √pᵀ), a projection being its own
    square.

    Args:
        f: Outputs.
        loss: `"mse"` or `"cross_entropy"`.

    Returns:
        One c×c matrix for each example, in float64.

    Raises:
        ValueError: If the loss is unknown.

    Example:
        >>> b = curvature_factor(torch.zeros(1, 2), loss="cross_entropy")
        >>> b @ b.mT
        tensor([[[ 0.2500, -0.2500],
                 [-0.2500,  0.2500]]], dtype=torch.float64)
    """
    loss_named("curvature_factor", loss)
    outputs = widened(f.detach())
    identity = torch.eye(f.shape[1]).to(outputs)
    if loss == "mse":
        return identity.repeat(len(f), 1, 1)
    root = outputs.softmax(-1).sqrt()
    return root[:, :, None] * (identity - root[:, :, None] * root[:, None, :])


def loss_weighted_kernel(
    ntk: Float[Tensor, "..."],
    f: Float[Tensor, "n c"],
    *,
    loss: LossName = "mse",
) -> Float[Tensor, "m m"]:
    """Kernel between the curvature of the loss on both sides, Bᵀ Θ B with B Bᵀ = H.

    Its eigenvalues other than zero are those of H^½ Θ H^½ and of the Gauss-Newton
    matrix Jᵀ H J of the loss, summed over the examples. Its largest one times the
    learning rate decides on stability as λ_max of Θ does for ½ Σ (f − y)², where the
    two are equal.

    Args:
        ntk: Kernel with both output axes, `(n, n, c, c)`; perhaps preconditioned.
        f: Outputs.
        loss: `"mse"` or `"cross_entropy"`, summed over the examples.

    Returns:
        Symmetric matrix of m = n·c rows in float64.

    Raises:
        ValueError: If the loss is unknown, or the shapes do not fit.

    Example:
        >>> ntk = torch.eye(2).expand(1, 1, 2, 2)
        >>> matrix = loss_weighted_kernel(ntk, torch.zeros(1, 2), loss="cross_entropy")
        >>> torch.linalg.eigvalsh(matrix).round(decimals=6).abs()
        tensor([0.0000, 0.5000], dtype=torch.float64)

    References:
        Schraudolph 2002, "Fast curvature matrix-vector products for second-order
        gradient descent"; Cohen et al. 2021, arXiv:2103.00065 (edge of stability).
    """
    n, c = f.shape
    if ntk.shape != (n, n, c, c):
        raise ValueError(
            f"loss_weighted_kernel: a kernel of shape {tuple(ntk.shape)} for outputs "
            f"{(n, c)}; expected {(n, n, c, c)}."
        )
    factor = curvature_factor(f, loss=loss)
    if loss == "mse":
        return widened(as_matrix(ntk))
    left = factor.mT[:, None] @ widened(ntk) @ factor[None]
    matrix = as_matrix(left)
    return (matrix + matrix.mT) / 2

"""The learning rate at which gradient descent in function space turns unstable."""

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_callbacks._types import Kernel
from ntk_callbacks.layout import as_matrix, widened


def max_learning_rate(
    ntk: Kernel, *, momentum: float = 0.0, nesterov: bool = False
) -> Float[Tensor, ""]:
    """Largest stable learning rate for the loss ½ Σ (f − y)² over the examples.

    2/λ_max for gradient descent, 2(1 + β)/λ_max with heavy-ball momentum β and
    2(1 + β)/((1 + 2β) λ_max) with Nesterov's. For a mean over N examples multiply by N,
    for `MSELoss` over N examples and c outputs by N·c/2.

    Args:
        ntk: Kernel on the training set, `(n, n, c, c)` or a symmetric matrix; on a
            subset the result is an upper bound.
        momentum: β in [0, 1).
        nesterov: Nesterov's momentum instead of the heavy ball.

    Returns:
        Learning rate in (0, ∞], float64; infinite if the kernel is zero, NaN if it
        is not finite.

    Raises:
        ValueError: If the momentum is outside [0, 1).

    Example:
        >>> max_learning_rate(torch.diag(torch.tensor([4.0, 1.0])))
        tensor(0.5000, dtype=torch.float64)

    References:
        Lee et al. 2019, arXiv:1902.06720; Cohen et al. 2021, arXiv:2103.00065
        (momentum).
    """
    matrix = widened(as_matrix(ntk))
    if not matrix.isfinite().all():
        return matrix.new_tensor(torch.nan)
    eigenvalues: Tensor = torch.linalg.eigvalsh(matrix)
    return learning_rate_limit(eigenvalues[-1], momentum=momentum, nesterov=nesterov)


def learning_rate_limit(
    eigenvalue_max: Float[Tensor, ""], *, momentum: float = 0.0, nesterov: bool = False
) -> Float[Tensor, ""]:
    """`max_learning_rate` where λ_max is known already.

    Args:
        eigenvalue_max: λ_max of the kernel.
        momentum: β in [0, 1).
        nesterov: Nesterov's momentum instead of the heavy ball.

    Returns:
        Learning rate in (0, ∞].

    Raises:
        ValueError: If the momentum is outside [0, 1).
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}.")
    gain = 1 + momentum
    if nesterov:
        gain /= 1 + 2 * momentum
    return 2 * gain / eigenvalue_max

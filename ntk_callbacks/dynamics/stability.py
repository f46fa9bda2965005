"""The learning rate at which gradient descent in function space turns unstable."""

import torch
from jaxtyping import Float
from torch import Tensor


def max_learning_rate(
    eigenvalue_max: Float[Tensor, ""] | float,
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
) -> Float[Tensor, ""]:
    """Largest stable learning rate for the loss ½ Σ (f − y)² over the probe.

    2/λ_max for gradient descent, 2(1 + β)/λ_max with heavy-ball momentum β and
    2(1 + β)/((1 + 2β) λ_max) with Nesterov's. For a mean over N examples multiply by N,
    for `MSELoss` over N examples and c outputs by N·c/2.

    Args:
        eigenvalue_max: Largest eigenvalue λ_max of the kernel on the training set; on a
            subset the result is an upper bound.
        momentum: β in [0, 1).
        nesterov: Nesterov's momentum instead of the heavy ball.

    Returns:
        Learning rate in (0, ∞]; infinite if λ_max is zero.

    Raises:
        ValueError: If the momentum is outside [0, 1).

    Example:
        >>> max_learning_rate(4.0)
        tensor(0.5000, dtype=torch.float64)

    References:
        Lee et al. 2019, arXiv:1902.06720; Cohen et al. 2021, arXiv:2103.00065
        (momentum).
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}.")
    largest = torch.as_tensor(eigenvalue_max, dtype=torch.float64)
    gain = 1 + momentum
    if nesterov:
        gain /= 1 + 2 * momentum
    return 2 * gain / largest

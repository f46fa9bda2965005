"""Which learning rates are stable, and how fast gradient descent then converges."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_callbacks._types import Kernel
from ntk_callbacks.dynamics.function_space import check_positive, kernel_matrix


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
        Learning rate in (0, ∞], float64; infinite if the kernel is zero.

    Raises:
        ValueError: If the kernel is not finite, symmetric and positive semi-definite
            up to round-off, or the momentum is outside [0, 1).

    Example:
        >>> max_learning_rate(torch.diag(torch.tensor([4.0, 1.0])))
        tensor(0.5000, dtype=torch.float64)

    References:
        Lee et al. 2019, arXiv:1902.06720; Cohen et al. 2021, arXiv:2103.00065
        (momentum).
    """
    largest = _eigenvalues("max_learning_rate", ntk)[0]
    return learning_rate_limit(largest, momentum=momentum, nesterov=nesterov)


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
    check_momentum(momentum)
    gain = 1 + momentum
    if nesterov:
        gain /= 1 + 2 * momentum
    return 2 * gain / eigenvalue_max


def contraction_factors(
    ntk: Kernel, *, learning_rate: float, momentum: float = 0.0, nesterov: bool = False
) -> Float[Tensor, " m"]:
    """Factor by which a late step shrinks the residual of each eigendirection.

    The larger root in absolute value of z² − (1 + β − ηλ) z + β for the heavy ball, of
    z² − (1 + β)(1 − ηλ) z + β(1 − ηλ) for Nesterov's momentum; |1 − ηλ| without. Below
    1 for all modes: training on ½ Σ (f − y)² converges; above 1 for one: it diverges.

    Args:
        ntk: Kernel on the training set, `(n, n, c, c)` or a symmetric matrix.
        learning_rate: η ≥ 0 for a loss summed over the examples.
        momentum: β in [0, 1).
        nesterov: Nesterov's momentum instead of the heavy ball.

    Returns:
        m factors ≥ 0 in float64, in the order of descending eigenvalues; 1 where the
        eigenvalue is zero.

    Raises:
        ValueError: If the momentum or the learning rate is out of range, or the kernel
            is not finite, symmetric and positive semi-definite up to round-off.

    Example:
        >>> contraction_factors(torch.diag(torch.tensor([4.0, 1.0])), learning_rate=0.5)
        tensor([1.0000, 0.5000], dtype=torch.float64)

    References:
        Polyak 1964, "Some methods of speeding up the convergence of iteration methods";
        Cohen et al. 2021, arXiv:2103.00065, appendix B.
    """
    return _factors("contraction_factors", ntk, learning_rate, momentum, nesterov)


def learning_steps(
    ntk: Kernel,
    *,
    learning_rate: float,
    momentum: float = 0.0,
    nesterov: bool = False,
    fraction: float = math.exp(-1),
) -> Float[Tensor, " m"]:
    """Steps until a fraction of each eigendirection's residual is left, late on.

    log(fraction)/log(ρ) with the contraction factor ρ; without momentum from the first
    step on, and 1/(ηλ) where ηλ is small. `learning_times` is the limit of small steps.

    Args:
        ntk: Kernel on the training set, `(n, n, c, c)` or a symmetric matrix.
        learning_rate: η ≥ 0 for a loss summed over the examples.
        momentum: β in [0, 1).
        nesterov: Nesterov's momentum instead of the heavy ball.
        fraction: In (0, 1).

    Returns:
        m numbers ≥ 0, not rounded, in the order of descending eigenvalues; infinite
        where training does not converge.

    Raises:
        ValueError: If the fraction, the momentum or the learning rate is out of range,
            or the kernel is not finite, symmetric and positive semi-definite.

    Example:
        >>> ntk = torch.diag(torch.tensor([1.0, 0.5]))
        >>> learning_steps(ntk, learning_rate=1.0, fraction=0.25)
        tensor([0., 2.], dtype=torch.float64)
    """
    if not 0 < fraction < 1:
        raise ValueError(f"learning_steps: fraction={fraction}; expected in (0, 1).")
    factors = _factors("learning_steps", ntk, learning_rate, momentum, nesterov)
    steps = math.log(fraction) / factors.log()
    return torch.where(factors < 1, steps, torch.inf)


def _factors(
    who: str, ntk: Tensor, learning_rate: float, momentum: float, nesterov: bool
) -> Float[Tensor, " m"]:
    check_momentum(momentum)
    if not 0 <= learning_rate < torch.inf:
        raise ValueError(f"{who}: learning_rate={learning_rate}; expected ≥ 0.")
    left = 1 - learning_rate * _eigenvalues(who, ntk)
    half = (left + momentum * (left if nesterov else 1)) / 2
    product = momentum * (left if nesterov else torch.ones_like(left))
    discriminant = half**2 - product
    real = half.abs() + discriminant.clamp(min=0).sqrt()
    return torch.where(discriminant < 0, product.abs().sqrt(), real)


def _eigenvalues(who: str, ntk: Tensor) -> Float[Tensor, " m"]:
    """Descending, those that are negative by round-off as zeros."""
    values: Tensor = torch.linalg.eigvalsh(kernel_matrix(who, ntk))
    check_positive(who, values[0], values[-1], torch.finfo(ntk.dtype).eps)
    return values.flip(0).clamp(min=0)


def check_momentum(momentum: float) -> None:
    """Raises a ValueError if the momentum is outside [0, 1)."""
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}.")

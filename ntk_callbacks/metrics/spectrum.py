"""Scalars of a spectrum: eigenvalues λ of a kernel, singular values s of a Jacobian.

All are computed in the dtype given, half precision in float32.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_callbacks.layout import widened
from ntk_callbacks.metrics.checks import not_empty, one_axis, real
from ntk_callbacks.metrics.magnitude import rescaled


def condition_number(
    values: Float[Tensor, " r"], *, tolerance: float = 0.0
) -> Float[Tensor, ""]:
    """Ratio of the largest to the smallest value, λ_max / λ_min.

    Args:
        values: Eigenvalues of a kernel, or singular values, in any order.
        tolerance: Values up to `tolerance · λ_max` count as zero; for a kernel of
            precision ε pass ε, below which λ_min is round-off.

    Returns:
        Value in [1, ∞]: infinite if the smallest counts as zero, NaN if none is above
        zero or a value is NaN.

    Raises:
        ValueError: If `values` is empty or has more axes than one.

    Example:
        >>> condition_number(torch.tensor([4.0, 1.0]))
        tensor(4.)
    """
    values = one_axis("condition_number", values)
    largest, smallest = values.max(), values.min()
    singular = smallest <= tolerance * largest
    ratio = torch.where(singular, torch.inf, largest / smallest)
    return torch.where(largest <= 0, torch.nan, ratio)


def participation_ratio(eigenvalues: Float[Tensor, " r"]) -> Float[Tensor, ""]:
    """Number of eigendirections that share the trace, (Σᵢ λᵢ)² / Σᵢ λᵢ².

    r for a flat spectrum, 1 for a rank-one kernel; needs no cut-off and does not change
    when the kernel is rescaled.

    Args:
        eigenvalues: Kernel eigenvalues in any order, non-negative up to round-off.

    Returns:
        Dimensionless value in [1, r]; NaN if every eigenvalue is zero.

    Raises:
        ValueError: If `eigenvalues` is empty or has more axes than one.

    Example:
        >>> participation_ratio(torch.tensor([4.0, 4.0, 0.0]))
        tensor(2.)
    """
    values = rescaled(one_axis("participation_ratio", eigenvalues))
    return values.sum() ** 2 / (values**2).sum()


def entropy_rank(eigenvalues: Float[Tensor, " r"]) -> Float[Tensor, ""]:
    """Effective number of eigendirections, exp(−Σᵢ pᵢ log pᵢ) with pᵢ = λᵢ/Σλ.

    At least the participation ratio; weighs small eigenvalues more.

    Args:
        eigenvalues: Kernel eigenvalues in any order; negative ones are round-off and
            count as zero.

    Returns:
        Dimensionless value in [1, r]; NaN if every eigenvalue is zero.

    Raises:
        ValueError: If `eigenvalues` is empty or has more axes than one.

    Example:
        >>> entropy_rank(torch.tensor([4.0, 4.0, 0.0]))
        tensor(2.)

    References:
        Roy, Vetterli 2007, "The effective rank", EUSIPCO.
    """
    shares = rescaled(one_axis("entropy_rank", eigenvalues)).clamp(min=0)
    shares = shares / shares.sum()
    entropy: Tensor = torch.special.entr(shares).sum()
    return entropy.exp()


def mean_square(singular_values: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """Mean squared singular value ⟨s²⟩; χ^L in mean-field theory, 1 at criticality.

    Args:
        singular_values: Values of one or several Jacobians.

    Returns:
        Value in [0, ∞).

    Raises:
        ValueError: If there is no value.

    References:
        Pennington, Schoenholz, Ganguli 2017, arXiv:1711.04735.
    """
    values = not_empty("mean_square", real("mean_square", singular_values))
    return values.square().mean()


def log_std(singular_values: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """Standard deviation of ln s: 0 exactly if all singular values are equal.

    Args:
        singular_values: Values of one or several Jacobians.

    Returns:
        Population standard deviation (divided by the count), in nats; infinite if some
        but not all values are zero, NaN if all are or one is NaN.

    Raises:
        ValueError: If there is no value.

    Example:
        >>> log_std(torch.tensor([2.0, 2.0]))
        tensor(0.)
    """
    values = not_empty("log_std", real("log_std", singular_values))
    zero = values == 0
    if zero.any() and not (zero.all() or values.isnan().any()):
        return values.new_tensor(torch.inf)
    logs = widened(values).log()  # the log of 1e20 has five decimals in float32
    # The mean of equal numbers is off by round-off; that of their differences is not.
    return (logs - logs.max()).std(correction=0).to(values)


def isometry_gap(singular_values: Float[Tensor, "*n r"]) -> Float[Tensor, "*n"]:
    """Distance from an isometry up to scale, maxᵢ |sᵢ²/⟨s²⟩ − 1|.

    The spectral norm of J Jᵀ/⟨s²⟩ − 1 on the smaller side of J; scale-free like
    `log_std`, but decided by the worst direction alone.

    Args:
        singular_values: The r = min(c, d) values of each of any number of Jacobians.

    Returns:
        For each Jacobian a value in [0, r − 1]: 0 if all values are equal, r − 1 for a
        matrix of rank one; NaN if all are zero.

    Raises:
        ValueError: If there is no value.

    Example:
        >>> isometry_gap(torch.tensor([[1.0, 1.0], [3.0, 1.0]]))
        tensor([0.0000, 0.8000])
    """
    values = not_empty("isometry_gap", real("isometry_gap", singular_values))
    # By the largest, not by a power of two: equal values are 1, and so is their mean.
    squares = (values / values.abs().amax(-1, keepdim=True)).square()
    return (squares / squares.mean(-1, keepdim=True) - 1).abs().amax(-1)

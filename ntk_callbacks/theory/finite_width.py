"""What a finite width adds to the infinite one: how far Θ(x, x) scatters over seeds.

Bias-free networks with piecewise linear activations, where every moment is exact: with
a = φ(h), D = diag φ'(h) and M = D Θ D at a layer, the second moments of |a|² and tr M,
and those of aᵀM a and tr M², close under the next layer's Gaussian weights. Flipping
the sign of a row of weights leaves all of them as they are, so that D is independent of
them: a diagonal of slopes that are drawn with equal probability.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ntk_callbacks._types import Kernel
from ntk_callbacks.layout import widened
from ntk_callbacks.theory.activations import Activation, elementwise
from ntk_callbacks.theory.closed_forms import PiecewiseLinear
from ntk_callbacks.theory.learning import check_depth, check_not_negative


@dataclass(frozen=True, slots=True)
class SeedStatistics:
    """Mean and variance over seeds of every entry of a kernel, with their errors.

    Args:
        mean: Of the seeds.
        mean_error: Standard error of the mean.
        variance: Over seeds, unbiased.
        variance_error: Standard error of the variance.
    """

    mean: Kernel
    mean_error: Kernel
    variance: Kernel
    variance_error: Kernel

    @property
    def relative_variance(self) -> Kernel:
        """Variance over squared mean, what `ntk_relative_variance` predicts."""
        return self.variance / self.mean**2


def seed_statistics(kernels: Sequence[Kernel]) -> SeedStatistics:
    """Mean and variance of kernels of several seeds, entry by entry.

    The error of the mean is √(s²/S) for S seeds of variance s², that of the variance
    √((m₄ − s⁴ (S − 3)/(S − 1))/S) with the fourth central moment m₄.

    Args:
        kernels: At least 2 kernels of one shape, as `empirical_ntk` gives them.

    Returns:
        Four tensors of that shape, float64; NaN where a kernel is not finite.

    Raises:
        ValueError: If there are fewer than 2 kernels, or their shapes differ.

    Example:
        >>> found = seed_statistics([torch.eye(1), 2 * torch.eye(1), 3 * torch.eye(1)])
        >>> found.mean.item(), found.variance.item(), found.relative_variance.item()
        (2.0, 1.0, 0.25)
    """
    shapes = {tuple(kernel.shape) for kernel in kernels}
    if len(kernels) < 2 or len(shapes) > 1:
        raise ValueError(
            f"seed_statistics: {len(kernels)} kernels of shapes {sorted(shapes)}; "
            "expected at least 2 of one shape, because the spread is told from their "
            "differences."
        )
    seeds = len(kernels)
    stacked = torch.stack([widened(kernel) for kernel in kernels])
    mean = stacked.mean(0)
    variance = stacked.var(0)
    fourth = ((stacked - mean) ** 4).mean(0)
    spread = (fourth - variance**2 * (seeds - 3) / (seeds - 1)).clamp(min=0)
    return SeedStatistics(
        mean, (variance / seeds).sqrt(), variance, (spread / seeds).sqrt()
    )


def ntk_mean(
    squared_norm: float,
    *,
    depth: int,
    activation: Activation = "relu",
    sigma_w: float = math.sqrt(2),
) -> float:
    """E Θ(x, x) of a bias-free network, at every width: (L + 1) σ_w² gᴸ |x|²/d.

    g = σ_w² E φ'² is 1 for ReLU with σ_w = √2. In NTK parametrization, one output.

    Args:
        squared_norm: |x|²/d of an input with d entries.
        depth: L ≥ 0, hidden layers.
        activation: A piecewise linear one: `"relu"`, `"linear"`, `"leaky_relu"`,
            `"abs"` or a `PiecewiseLinear`.
        sigma_w: σ_w of every layer.

    Returns:
        A number ≥ 0.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> round(ntk_mean(0.25, depth=3), 12)
        2.0

    References:
        Jacot, Gabriel, Hongler 2018, arXiv:1806.07572 (the limit); Hanin, Nica 2020,
        arXiv:1909.05989 (finite width).
    """
    check_depth(depth)
    check_not_negative(squared_norm=squared_norm, sigma_w=sigma_w)
    second, _ = _slope_moments(activation)
    return (depth + 1) * sigma_w**2 * squared_norm * (sigma_w**2 * second) ** depth


def ntk_relative_variance(
    widths: Sequence[int], *, activation: Activation = "relu"
) -> float:
    """Var Θ(x, x)/(E Θ(x, x))² over seeds of a bias-free network, exactly.

    Whatever input, σ_w and parametrization of one scale for all layers. Grows like
    exp(5 Σ 1/n) for ReLU where depth over width is not small, beyond the leading order.

    Args:
        widths: n₁ … n_L of the hidden layers; none is a linear model, which is 0.
        activation: A piecewise linear one, as in `ntk_mean`.

    Returns:
        A number ≥ 0.

    Raises:
        ValueError: If a width is not positive or the activation not piecewise linear.

    Example:
        One hidden layer of n ReLU scatters by 3/n, of n linear units by 1/n:

        >>> round(ntk_relative_variance([32]), 12)
        0.09375
        >>> round(ntk_relative_variance([32], activation="linear"), 12)
        0.03125

    References:
        Hanin, Nica 2020, arXiv:1909.05989.
    """
    _check_widths(widths)
    second, fourth = _slope_moments(activation)
    # Of |a|⁴, |a|² tr M, aᵀM a, (tr M)², tr M², in units in which E |a|² is 1 and
    # E tr M is l after l layers.
    norm, mixed, quadratic, trace, square = 1.0, 0.0, 0.0, 0.0, 0.0
    ratio = fourth / second**2
    for n in widths:
        # Of n² pairs of units, n are one unit twice, whose slope enters as φ'⁴.
        same, other = ratio / n, (n - 1) / n
        whole = norm + 2 * mixed + trace
        unit = whole + 2 * square
        norm, mixed, quadratic, trace, square = (
            (3 * same + other) * norm,
            same * (norm + mixed + 2 * quadratic) + other * (norm + mixed),
            same * (norm + mixed + 2 * quadratic) + other * quadratic,
            same * unit + other * whole,
            same * unit + other * square,
        )
    second_moment = norm + 2 * mixed + trace + 2 * square
    return second_moment / (len(widths) + 1) ** 2 - 1


def ntk_relative_variance_at_large_width(
    width: int, depth: int, *, activation: Activation = "relu"
) -> float:
    """The leading order in 1/n of `ntk_relative_variance` for L layers of width n.

    L ((7κ − 3) L + 5κ − 3)/(3 (L + 1) n) with κ = E φ'⁴/(E φ'²)²: L (11L + 7)/(3(L + 1)
    n) for ReLU, κ = 2, and L (4L + 2)/(3(L + 1) n) for linear networks, κ = 1. Right
    for one hidden layer at every width, else up to terms of order (L/n)².

    Args:
        width: n ≥ 1.
        depth: L ≥ 0, hidden layers.
        activation: A piecewise linear one, as in `ntk_mean`.

    Returns:
        A number ≥ 0.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> round(1000 * ntk_relative_variance_at_large_width(1000, 4), 6)
        13.6
        >>> round(1000 * ntk_relative_variance([1000] * 4), 3)
        13.683

    References:
        Hanin, Nica 2020, arXiv:1909.05989; Roberts, Yaida, Hanin 2021,
        arXiv:2106.10165, chapter 8 (the growth with depth over width).
    """
    _check_widths([width])
    check_depth(depth)
    second, fourth = _slope_moments(activation)
    ratio = fourth / second**2
    growth = (7 * ratio - 3) * depth + 5 * ratio - 3
    return depth * growth / (3 * (depth + 1) * width)


def activation_relative_variance(
    widths: Sequence[int], *, activation: Activation = "relu"
) -> float:
    """Var |a_L|²/(E |a_L|²)² of the last hidden layer over seeds, exactly.

    ∏ (1 + (3κ − 1)/n_l) − 1 with κ = E φ'⁴/(E φ'²)²: factors 1 + 5/n for ReLU, 1 + 2/n
    for linear layers.

    Args:
        widths: n₁ … n_L of the hidden layers.
        activation: A piecewise linear one, as in `ntk_mean`.

    Returns:
        A number ≥ 0.

    Raises:
        ValueError: If a width is not positive or the activation not piecewise linear.

    Example:
        >>> round(activation_relative_variance([32] * 8) + 1, 4)
        3.1946

    References:
        Hanin, Rolnick 2018, arXiv:1803.01719.
    """
    _check_widths(widths)
    second, fourth = _slope_moments(activation)
    excess = 3 * fourth / second**2 - 1
    return math.prod((1 + excess / n for n in widths), start=1.0) - 1


def _slope_moments(activation: Activation) -> tuple[float, float]:
    """E φ'² and E φ'⁴ over the two sides of zero."""
    known = elementwise(activation)
    if not isinstance(known, PiecewiseLinear):
        raise ValueError(
            f"activation is {activation!r}; expected a piecewise linear one ('relu', "
            "'leaky_relu', 'abs', 'linear' or a PiecewiseLinear), for which the "
            "variance is known at every width."
        )
    slopes = known.positive, known.negative
    second, fourth = (sum(slope**power for slope in slopes) / 2 for power in (2, 4))
    if not 0 < second < math.inf:
        raise ValueError(f"activation is {activation!r}; expected slopes not all 0.")
    return second, fourth


def _check_widths(widths: Sequence[int]) -> None:
    if not all(isinstance(n, int) and n >= 1 for n in widths):
        raise ValueError(f"widths are {list(widths)}; expected whole numbers ≥ 1.")

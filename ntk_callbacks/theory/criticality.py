"""Where order and chaos meet: χ = 1, signals and gradients survive any depth.

The critical points of an activation form a line with the variance q as its parameter:

    σ_w² = 1/E φ'(√q z)²        σ_b² = q − σ_w² E φ(√q z)²

For φ = tanh or erf it starts at (σ_w, σ_b) = (1/φ'(0), 0) and runs to large σ_w. For a
piecewise linear φ it is one point: (√2, 0) for ReLU, with every q.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_callbacks.theory.activations import Activation
from ntk_callbacks.theory.expectations import curvature_moment, moment, real_numbers
from ntk_callbacks.theory.learning import check_not_negative
from ntk_callbacks.theory.mean_field import MeanField, mean_field
from ntk_callbacks.theory.roots import bracketed_root

_ROUND_OFF = 1e-12


@dataclass(frozen=True, slots=True)
class CriticalPoint:
    """A point with χ = 1 at a fixed point of the variance.

    Args:
        sigma_w: σ_w.
        sigma_b: σ_b; NaN where this variance is not the fixed point of any σ_b.
        q: Variance of the pre-activations.
    """

    sigma_w: Float[Tensor, "..."]
    sigma_b: Float[Tensor, "..."]
    q: Float[Tensor, "..."]


def critical_line(
    activation: Activation, q: Float[Tensor, "..."] | float
) -> CriticalPoint:
    """The critical line of an activation, by the variance q of the pre-activations.

    Args:
        activation: A name in `ACTIVATIONS` or an elementwise callable φ.
        q: Variances ≥ 0.

    Returns:
        `CriticalPoint(sigma_w, sigma_b, q)` of the shape of `q`, float64.

    Raises:
        ValueError: If a variance is negative or not finite, or the activation unknown.

    Example:
        >>> critical_line("tanh", 0.57004788).sigma_w
        tensor(1.3270, dtype=torch.float64)

    References:
        Schoenholz et al. (2017), arXiv:1611.01232; Hayou et al. (2019),
        arXiv:1902.06853 (edge of chaos of ReLU-like activations).
    """
    q = real_numbers("q", q)
    w2 = 1 / moment(activation, q, derivative=1)
    b2 = q - w2 * moment(activation, q)
    # A line that is a point: σ_b² is zero up to round-off.
    b2 = torch.where(b2.abs() <= _ROUND_OFF * q, 0.0, b2)
    return CriticalPoint(w2.sqrt(), torch.where(b2 >= 0, b2, torch.nan).sqrt(), q)


def critical_sigma_w(
    activation: Activation, sigma_b: Float[Tensor, ""] | float
) -> Float[Tensor, ""]:
    """The σ_w that makes a network with this σ_b critical, χ = 1.

    See `critical_point`, which also says at which variance.

    Args:
        activation: A name in `ACTIVATIONS` or an elementwise callable φ.
        sigma_b: σ_b ≥ 0.

    Returns:
        σ_w, float64.

    Raises:
        ValueError: If there is none: piecewise linear activations are critical at
            σ_b = 0 only. Or if an argument is out of range.

    Example:
        >>> critical_sigma_w("tanh", 0.05**0.5)
        tensor(1.3270, dtype=torch.float64)
        >>> critical_sigma_w("relu", 0.0)
        tensor(1.4142, dtype=torch.float64)

    References:
        Schoenholz et al. (2017), arXiv:1611.01232.
    """
    return critical_point(activation, sigma_b).sigma_w


def critical_point(
    activation: Activation, sigma_b: Float[Tensor, ""] | float
) -> CriticalPoint:
    """The critical point with this σ_b.

    Of several it is the one with the smallest variance at which the q-map is stable,
    V'(q) = 1 + σ_w² E φ φ'' ≤ 1; variances up to 1e6 are searched.

    Args:
        activation: A name in `ACTIVATIONS` or an elementwise callable φ.
        sigma_b: σ_b ≥ 0.

    Returns:
        `CriticalPoint(sigma_w, sigma_b, q)` of scalars, float64. Where every variance
        is critical, as for ReLU, q is 1; at a point that only q → 0 reaches, as for
        tanh and σ_b = 0, it is 0.

    Raises:
        ValueError: If there is none, or an argument is out of range.

    Example:
        >>> critical_point("erf", 0.1**0.5).q
        tensor(0.7264, dtype=torch.float64)

    References:
        Schoenholz et al. (2017), arXiv:1611.01232; Hayou et al. (2019),
        arXiv:1902.06853.
    """
    check_not_negative(sigma_b=float(sigma_b))
    shift = torch.as_tensor(sigma_b, dtype=torch.float64).detach()
    grid = 10 ** torch.linspace(-12, 6, 451, dtype=torch.float64)
    rest = _surplus(activation, grid) - shift**2
    # Zero up to round-off is neither sign.
    rest = torch.where(rest.abs() <= _ROUND_OFF * grid, 0.0, rest)
    zero = torch.zeros((), dtype=torch.float64)
    candidates = [zero + 1] if (rest == 0).all() else []
    if shift == 0 and moment(activation, zero) < _ROUND_OFF and not candidates:
        candidates.append(zero)
    # Pairs of neighbors but one, for a root may lie on the grid itself.
    for k in (rest[:-2] * rest[2:] < 0).nonzero()[:, 0].tolist():
        if rest[k] * rest[k + 1] <= 0:
            root = bracketed_root(
                lambda q: _surplus(activation, q) - shift**2, grid[k], grid[k + 2]
            )
            candidates.append(root)
    for q in candidates:
        w2 = 1 / moment(activation, q, derivative=1)
        # At q = 0 it is what comes next that decides.
        bend = w2 * curvature_moment(activation, q.clamp(min=1e-6))
        if w2.isfinite() and bend <= 1e-9:
            return CriticalPoint(w2.sqrt(), shift, q)
    unstable = ", ".join(f"{float(q):.4g}" for q in candidates) or "none"
    raise ValueError(
        f"no critical point: {activation!r} with sigma_b={float(sigma_b):g} has no "
        f"stable variance with χ = 1 up to 1e6 (unstable ones: {unstable}). Piecewise "
        "linear activations are critical at sigma_b=0 only; `critical_line` gives the "
        "points there are."
    )


def _surplus(activation: Activation, q: Tensor) -> Tensor:
    """σ_b² that makes q critical."""
    return q - moment(activation, q) / moment(activation, q, derivative=1)


def phase_diagram(
    activation: Activation,
    sigma_w: Float[Tensor, " w"],
    sigma_b: Float[Tensor, " b"],
    *,
    q0: float = 1.0,
) -> MeanField:
    """Order and chaos over a grid of σ_w and σ_b.

    Args:
        activation: A name in `ACTIVATIONS` or an elementwise callable φ.
        sigma_w: Values of σ_w ≥ 0, the columns.
        sigma_b: Values of σ_b ≥ 0, the rows.
        q0: Variance to start from, as in `mean_field`.

    Returns:
        `MeanField` of (b, w) fixed points and depth scales; its `is_chaotic` is the
        phase.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> weights = torch.tensor([0.5, 1.0, 2.0])
        >>> phase_diagram("tanh", weights, torch.tensor([0.1, 0.5])).is_chaotic
        tensor([[False, False,  True],
                [False, False,  True]])

    References:
        Poole et al. (2016), arXiv:1606.05340, figure 1; Schoenholz et al. (2017),
        arXiv:1611.01232.
    """
    for name, sigma in (("sigma_w", sigma_w), ("sigma_b", sigma_b)):
        if sigma.ndim != 1:
            raise ValueError(
                f"{name} has shape {tuple(sigma.shape)}, expected a list: the "
                "diagram holds every pair of σ_w and σ_b."
            )
    return mean_field(activation, sigma_w[None, :], sigma_b[:, None], q0=q0)

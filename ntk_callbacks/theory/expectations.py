"""Gaussian expectations of activations: all that infinite width needs to know of them.

Closed forms for the piecewise linear activations, erf and sin; quadrature for the rest
(`ntk_callbacks.theory.quadrature`), to a checked 1e-8 or better. Everything is
elementwise over tensors of variances and covariances, in float64. At variance 0 every
quantity is its limit for small variances, so that φ' at a kink is averaged over its two
sides.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_callbacks.theory.activations import Activation, elementwise, value_and_slope
from ntk_callbacks.theory.closed_forms import Erf, PiecewiseLinear, Sin
from ntk_callbacks.theory.correlated import pair_expectation
from ntk_callbacks.theory.quadrature import cuts_for, line_expectation

_KNOWN = (PiecewiseLinear, Erf, Sin)
_SMALLEST = 1e-100
_SMALLEST_FOR_CURVATURE = 1e-10


def moment(
    activation: Activation,
    q: Float[Tensor, "..."] | float,
    *,
    power: int = 2,
    derivative: int = 0,
) -> Float[Tensor, "..."]:
    """E φ(√q z)^power for standard normal z, or the same of φ'.

    Args:
        activation: A name in `ACTIVATIONS` or an elementwise callable.
        q: Variances, of any shape.
        power: 1, 2, 3, ….
        derivative: 0 for φ, 1 for φ'.

    Returns:
        Moments of the shape of `q`, float64.

    Raises:
        ValueError: If a variance is negative or not finite, `power` or `derivative` is
            out of range, or the integral does not converge.

    Example:
        >>> moment("relu", 2.0)
        tensor(1.0000, dtype=torch.float64)
        >>> moment("tanh", torch.tensor([0.5, 1.0]), derivative=1)
        tensor([0.5924, 0.4644], dtype=torch.float64)

    References:
        Poole et al. (2016), arXiv:1606.05340 (q-map and χ).
    """
    q = _variances(q=q)[0]
    if derivative not in (0, 1) or not isinstance(power, int) or power < 1:
        raise ValueError(
            f"moment: power={power}, derivative={derivative}; expected a whole "
            "power of at least 1 and derivative 0 or 1."
        )
    phi = elementwise(activation)
    if isinstance(phi, _KNOWN):
        known = phi.moment(q, power, derivative)
        if known is not None:
            return known
    return _line(
        phi, q, lambda z, value, slope: (slope if derivative else value) ** power
    )


def curvature_moment(
    activation: Activation, q: Float[Tensor, "..."] | float
) -> Float[Tensor, "..."]:
    """E φ(u) φ''(u) for u ~ N(0, q).

    Integrated by parts, E z φ(√q z) φ'(√q z)/√q − E φ'², so that it needs no second
    derivative and counts what a kink contributes to φ''.

    Args:
        activation: A name in `ACTIVATIONS` or an elementwise callable.
        q: Variances, of any shape; below 1e-10 the value at 1e-10 is returned.

    Returns:
        Values of the shape of `q`, float64.

    Raises:
        ValueError: If a variance is negative or not finite, or the integral does not
            converge.

    Example:
        >>> curvature_moment("sin", 1.0) + moment("sin", 1.0)
        tensor(0., dtype=torch.float64)

    References:
        Schoenholz et al. (2017), arXiv:1611.01232 (depth scale ξ_q).
    """
    q = _variances(q=q)[0]
    phi = elementwise(activation)
    if isinstance(phi, _KNOWN):
        return phi.curvature(q)
    q = q.clamp(min=_SMALLEST_FOR_CURVATURE)
    first = _line(phi, q, lambda z, value, slope: z * value * slope)
    return first / q.sqrt() - _line(phi, q, lambda z, value, slope: slope**2)


def pair_moment(
    activation: Activation,
    q1: Float[Tensor, "..."] | float,
    q2: Float[Tensor, "..."] | float,
    q12: Float[Tensor, "..."] | float,
    *,
    derivative: int = 0,
) -> Float[Tensor, "..."]:
    """E φ(u) φ(v), or E φ'(u) φ'(v), for (u, v) ~ N(0, [[q1, q12], [q12, q2]]).

    Args:
        activation: A name in `ACTIVATIONS` or an elementwise callable.
        q1: Variances of u.
        q2: Variances of v; the three shapes are broadcast.
        q12: Covariances; within 1e-15 of ±√(q1 q2), or beyond it by round-off, they are
            taken as ±√(q1 q2).
        derivative: 0 for φ, 1 for φ'.

    Returns:
        Values of the broadcast shape, float64.

    Raises:
        ValueError: If the numbers are not covariances, `derivative` is neither 0 nor 1,
            or the integral does not converge.

    Example:
        >>> pair_moment("relu", 1.0, 1.0, torch.tensor([0.0, 1.0]))
        tensor([0.1592, 0.5000], dtype=torch.float64)

    References:
        Cho and Saul (2009), Williams (1997) for ReLU and erf.
    """
    first, second = _variances(q1=q1, q2=q2)
    shared = real_numbers("q12", q12)
    if derivative not in (0, 1):
        raise ValueError(f"pair_moment: derivative is {derivative}, expected 0 or 1.")
    bound = (first * second).sqrt() + torch.zeros_like(shared)
    excess = shared.abs() - bound
    if not (excess <= 1e-8 * bound + 1e-30).all():
        raise ValueError(
            "pair_moment: not covariances: |q12| exceeds √(q1 q2) by up to "
            f"{excess.max().item():.3g}."
        )
    # Correlations that round-off does not tell from ±1 are ±1: a derivative with a jump
    # would magnify it to its root.
    aligned = shared.abs() >= bound * (1 - 1e-15)
    shared = torch.where(aligned, bound * shared.sign(), shared)
    phi = elementwise(activation)
    if isinstance(phi, _KNOWN):
        return phi.pair(first, second, shared, derivative)
    # Quadrature is done on the CPU.
    arguments = (first.cpu(), second.cpu(), shared.cpu())
    return pair_expectation(phi, *arguments, derivative).to(shared.device)


def _line(
    phi: Callable[[Tensor], Tensor],
    q: Tensor,
    integrand: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    deviations = q.cpu().clamp(min=_SMALLEST).sqrt()  # quadrature is done there
    distinct, where = torch.unique(deviations, return_inverse=True)

    def along(z: Tensor, deviation: Tensor) -> Tensor:
        return integrand(z, *value_and_slope(phi, z * deviation))

    cuts = cuts_for(phi, distinct)
    return line_expectation(along, distinct[:, None], cuts)[where].to(q.device)


def real_numbers(name: str, numbers: Tensor | float) -> Float[Tensor, "..."]:
    """Numbers as a tensor in float64, without their gradients.

    Args:
        name: Of the argument.
        numbers: One, or a tensor.

    Returns:
        A tensor of their shape.

    Raises:
        ValueError: If they are complex.
    """
    if isinstance(numbers, Tensor) and numbers.is_complex():
        raise ValueError(f"{name} is complex, expected real numbers.")
    return torch.as_tensor(numbers, dtype=torch.float64).detach()


def _variances(**variances: Tensor | float) -> list[Tensor]:
    found = []
    for name, given in variances.items():
        q = real_numbers(name, given)
        if not ((q >= 0) & q.isfinite()).all():
            worst = q[~((q >= 0) & q.isfinite())].flatten()[0].item()
            raise ValueError(f"{name} holds {worst}, expected variances of at least 0.")
        found.append(q)
    return found

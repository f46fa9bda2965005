"""Activations whose Gaussian expectations are known in closed form.

Each is a callable and answers three questions about a centered Gaussian argument:
`moment` and `curvature` for one argument of variance q, `pair` for two of covariance
[[q1, q12], [q12, q2]]. Correlations enter through `remainder`, √(q1 q2 − q12²), and
atan2, never through arccos: nothing is lost where two arguments nearly agree.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


def remainder(
    q1: Float[Tensor, "..."], q2: Float[Tensor, "..."], q12: Float[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """What one argument leaves open of the other, √(q1 q2 − q12²), never negative."""
    # Exactly zero for q12 = ±q1 = ±q2: the root of a rounded square is the number.
    scale = (q1 * q2).sqrt()
    return ((scale - q12).clamp(min=0) * (scale + q12).clamp(min=0)).sqrt()


@dataclass(frozen=True, slots=True)
class PiecewiseLinear:
    """φ(x) = `positive`·x for x > 0 and `negative`·x for x ≤ 0.

    ReLU is (1, 0), leaky ReLU (1, slope), the absolute value (1, −1), the identity
    (1, 1).

    Args:
        positive: Slope on the right.
        negative: Slope on the left.

    Example:
        >>> PiecewiseLinear(1.0, 0.1)(torch.tensor([2.0, -2.0]))
        tensor([ 2.0000, -0.2000])

    References:
        Cho and Saul (2009), Kernel methods for deep learning (arc-cosine kernels).
    """

    positive: float
    negative: float

    def __call__(self, x: Tensor, /) -> Tensor:
        """φ(x), elementwise."""
        return self.positive * x.clamp(min=0) + self.negative * x.clamp(max=0)

    def moment(self, q: Tensor, power: int, derivative: int) -> Tensor:
        """½ (p^k + (−n)^k) E|z|^k q^(k/2) for slopes p, n and power k; φ' likewise."""
        if derivative:
            constant = (self.positive**power + self.negative**power) / 2
            return torch.full_like(q, constant)
        half = (self.positive**power + (-self.negative) ** power) / 2
        absolute = 2 ** (power / 2) * math.gamma((power + 1) / 2) / math.sqrt(math.pi)
        return half * absolute * q ** (power / 2)

    def curvature(self, q: Tensor) -> Tensor:
        """φ'' is concentrated at 0, where φ is 0."""
        return torch.zeros_like(q)

    def pair(self, q1: Tensor, q2: Tensor, q12: Tensor, derivative: int) -> Tensor:
        """From φ = mean slope · x + half difference · |x|; E u |v| is 0."""
        mean = (self.positive + self.negative) / 2
        difference = (self.positive - self.negative) / 2
        rest = remainder(q1, q2, q12)
        arcsine = torch.atan2(q12, rest)  # of the correlation; 1 of 0 with itself
        arcsine = torch.where(q1 + q2 > 0, arcsine, math.pi / 2)
        if derivative:
            return mean**2 + difference**2 * (2 / math.pi) * arcsine
        absolute = (2 / math.pi) * (rest + q12 * arcsine)  # E |u| |v|
        return mean**2 * q12 + difference**2 * absolute


@dataclass(frozen=True, slots=True)
class Erf:
    """The error function, φ(x) = (2/√π) ∫₀ˣ exp(−t²) dt.

    References:
        Williams (1997), Computing with infinite networks.
    """

    def __call__(self, x: Tensor, /) -> Tensor:
        """φ(x), elementwise."""
        return torch.erf(x)

    def moment(self, q: Tensor, power: int, derivative: int) -> Tensor | None:
        """φ' is Gaussian; of φ itself only the square and odd powers are known."""
        if derivative:
            return (2 / math.sqrt(math.pi)) ** power / (1 + 2 * power * q).sqrt()
        if power % 2:
            return torch.zeros_like(q)
        return self.pair(q, q, q, 0) if power == 2 else None

    def curvature(self, q: Tensor) -> Tensor:
        """From d/dq E φ² = E φ'² + E φ φ''."""
        return -(8 / math.pi) * q / ((1 + 2 * q) * (1 + 4 * q).sqrt())

    def pair(self, q1: Tensor, q2: Tensor, q12: Tensor, derivative: int) -> Tensor:
        """(2/π) arcsin(2 q12/√((1 + 2 q1)(1 + 2 q2))), and its derivative in q12."""
        rest = (1 + 2 * (q1 + q2) + 4 * remainder(q1, q2, q12) ** 2).sqrt()
        if derivative:
            return (4 / math.pi) / rest
        return (2 / math.pi) * torch.atan2(2 * q12, rest)


@dataclass(frozen=True, slots=True)
class Sin:
    """The sine; its expectations are those of exp(i u)."""

    def __call__(self, x: Tensor, /) -> Tensor:
        """φ(x), elementwise."""
        return torch.sin(x)

    def moment(self, q: Tensor, power: int, derivative: int) -> Tensor | None:
        """½ (1 ∓ exp(−2q)) for the square."""
        if power == 2:
            return self.pair(q, q, q, derivative)
        if power == 1:
            return (-q / 2).exp() if derivative else torch.zeros_like(q)
        return None

    def curvature(self, q: Tensor) -> Tensor:
        """φ'' = −φ."""
        return -self.pair(q, q, q, 0)

    def pair(self, q1: Tensor, q2: Tensor, q12: Tensor, derivative: int) -> Tensor:
        """exp(−(q1 + q2)/2) sinh q12, with cosh for φ'; no power overflows."""
        middle = (q1 + q2) / 2
        if derivative:
            return ((q12 - middle).exp() + (-q12 - middle).exp()) / 2
        size = q12.abs()
        return q12.sign() * (size - middle).exp() * -torch.expm1(-2 * size) / 2

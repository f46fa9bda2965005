"""Eigendirections of a kernel: the residual shrinks in each at a rate of its own."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_callbacks.dynamics.function_space import (
    Times,
    check_positive,
    kernel_matrix,
    moments,
)
from ntk_callbacks.layout import widened


@dataclass(frozen=True, slots=True)
class Eigenmodes:
    """Θ = V diag(λ) Vᵀ, the largest eigenvalue first, in float64.

    Under gradient flow on ½ Σ (f − y)² the component Vᵀ(f − y) in mode i falls as
    e^(−λᵢt). Directions of equal eigenvalues are only fixed up to a rotation: compare
    what is measured later with the modes of one and the same kernel.

    Attributes:
        eigenvalues: λ ≥ 0, m of them; negative round-off is set to zero.
        directions: V, orthonormal columns, (m, m).
        cutoff: Eigenvalues up to this are zero within the round-off of the kernel's
            dtype, 4 √m ε λ_max.

    Example:
        >>> modes = eigenmodes(torch.diag(torch.tensor([1.0, 4.0])))
        >>> modes.eigenvalues
        tensor([4., 1.], dtype=torch.float64)
        >>> modes.components(torch.tensor([3.0, -2.0])).abs()
        tensor([2., 3.], dtype=torch.float64)
    """

    eigenvalues: Float[Tensor, " m"]
    directions: Float[Tensor, "m m"]
    cutoff: float

    def components(self, residual: Float[Tensor, "..."]) -> Float[Tensor, "m *k"]:
        """The residual in each mode, Vᵀ(f − y).

        Args:
            residual: f − y (or any gradient in function space) with m numbers, or
                `(m, k)` for outputs that share the kernel.

        Returns:
            `(m,)` or `(m, k)`; the sum of squares is that of the residual.

        Raises:
            ValueError: If the shape does not fit.
        """
        m = len(self.eigenvalues)
        wide = widened(residual.detach()).to(self.directions.device)
        if wide.numel() == m:
            return self.directions.mT @ wide.reshape(m)
        if wide.ndim == 2 and len(wide) == m:
            return self.directions.mT @ wide
        raise ValueError(
            f"Eigenmodes: a residual of shape {tuple(wide.shape)} for {m} modes; "
            f"expected {m} numbers, or ({m}, k) for outputs that share the kernel."
        )

    def decay(self, t: Times) -> Float[Tensor, "*times m"]:
        """Fraction of each mode's residual that is left, e^(−λt).

        Args:
            t: Time ≥ 0, or several; infinity keeps what the kernel cannot see.

        Returns:
            `(m,)`, or `(times, m)`, in [0, 1].

        Raises:
            ValueError: If a time is negative or NaN.
        """
        times, scalar = moments("Eigenmodes.decay", t)
        times = times.to(self.eigenvalues)[:, None]
        finite = times.isfinite()
        x = times.masked_fill(~finite, 0) * self.eigenvalues
        never = (self.eigenvalues <= self.cutoff).to(x)
        left = torch.where(finite, torch.exp(-x), never)
        return left[0] if scalar else left

    def learned(self, times: Float[Tensor, " times"]) -> Float[Tensor, "times m"]:
        """1 − e^(−λt), to full precision where it is small."""
        return self.response(times) * self.eigenvalues

    def response(self, times: Float[Tensor, " times"]) -> Float[Tensor, "times m"]:
        """(1 − e^(−λt))/λ: t while λt is small; in the end 1/λ, or 0 where λ is 0."""
        rates = self.eigenvalues
        null = rates <= self.cutoff
        inverse = torch.where(null, 0, 1 / rates.masked_fill(null, 1))
        times = times.to(rates)[:, None]
        finite = times.isfinite()
        t = times.masked_fill(~finite, 0)
        x = t * rates
        share = torch.where(x > 0, -torch.expm1(-x) / x.masked_fill(x == 0, 1), 1)
        return torch.where(finite, t * share, inverse)

    def loss_change(
        self, residual: Float[Tensor, "..."], *, learning_rate: float
    ) -> Float[Tensor, " m"]:
        """Change of ½ Σ (f − y)² by one step of gradient descent, mode by mode.

        (−ηλ + η²λ²/2) (Vᵀ(f − y))²: exact for a model linear in its parameters.

        Args:
            residual: f − y, as in `components`.
            learning_rate: η ≥ 0.

        Returns:
            m numbers that add up to the change of the loss; positive where ηλ > 2.
        """
        x = learning_rate * self.eigenvalues
        squares = self.components(residual).reshape(len(x), -1).square().sum(1)
        return (x * x / 2 - x) * squares


def eigenmodes(ntk: Float[Tensor, "..."]) -> Eigenmodes:
    """The eigendirections of a kernel on one set of examples.

    Args:
        ntk: `(n, n, c, c)`, `(n, n, c)` or a symmetric matrix.

    Returns:
        Eigenvalues, the largest first, and directions.

    Raises:
        ValueError: If the kernel is not finite, symmetric and positive semi-definite
            up to the square root of its dtype's round-off.

    Example:
        >>> eigenmodes(torch.eye(3).double()).decay(1.0)
        tensor([0.3679, 0.3679, 0.3679], dtype=torch.float64)

    References:
        Jacot et al. 2018, arXiv:1806.07572, section 5 (kernel principal components).
    """
    return spectrum("eigenmodes", kernel_matrix("eigenmodes", ntk), _precision(ntk))


def learning_times(
    ntk: Float[Tensor, "..."], *, fraction: float = math.exp(-1)
) -> Float[Tensor, " m"]:
    """Time until gradient flow leaves a fraction of each mode's residual.

    −log(fraction)/λ for the loss ½ Σ (f − y)²; 1/λ by default. For a mean over N
    examples multiply by N, and divide by the learning rate for steps of small size
    (`learning_steps` counts them for any size).

    Args:
        ntk: Kernel on the training set.
        fraction: In (0, 1).

    Returns:
        m times, ascending; infinite where the eigenvalue is zero.

    Raises:
        ValueError: If the fraction is outside (0, 1) or the kernel is none.

    Example:
        >>> learning_times(torch.diag(torch.tensor([1.0, 4.0])))
        tensor([0.2500, 1.0000], dtype=torch.float64)
    """
    if not 0 < fraction < 1:
        raise ValueError(f"learning_times: fraction={fraction}; expected in (0, 1).")
    matrix = kernel_matrix("learning_times", ntk)
    modes = spectrum("learning_times", matrix, _precision(ntk))
    rates = modes.eigenvalues
    return torch.where(rates > modes.cutoff, -math.log(fraction) / rates, torch.inf)


def spectrum(who: str, matrix: Float[Tensor, "m m"], eps: float) -> Eigenmodes:
    """`eigenmodes` of a checked matrix, for the function `who`."""
    values, vectors = torch.linalg.eigh(matrix)
    check_positive(who, values[0], values[-1], eps)
    cutoff = 4 * math.sqrt(len(values)) * eps * float(values[-1].clamp(min=0))
    return Eigenmodes(values.flip(0).clamp(min=0), vectors.flip(1), cutoff)


def _precision(ntk: Tensor) -> float:
    return torch.finfo(ntk.dtype).eps

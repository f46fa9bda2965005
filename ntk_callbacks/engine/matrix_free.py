"""Eigenpairs and trace of a kernel that is never formed; its density: `density`.

The operator is opened once for each call. Vectors stay in its dtype, small projected
problems are solved in float64, and random vectors come from a generator of their own.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_callbacks.engine.products import TangentOperator
from ntk_callbacks.layout import widened


@dataclass(frozen=True, slots=True)
class Eigenpairs:
    """The k largest eigenvalues of Θ and their eigenvectors.

    Args:
        eigenvalues: λ in float64, the largest first.
        eigenvectors: Orthonormal columns v; their signs, and rotations among equal
            eigenvalues, are arbitrary.
        residuals: ‖Θv − λv‖; an eigenvalue of Θ lies within that distance of λ.
        converged: Whether every residual is as small as asked for.
    """

    eigenvalues: Float[Tensor, " k"]
    eigenvectors: Float[Tensor, "m k"]
    residuals: Float[Tensor, " k"]
    converged: bool


@dataclass(frozen=True, slots=True)
class TraceEstimate:
    """The trace of Θ, summed over examples and outputs.

    Args:
        value: Tr Θ.
        standard_error: Of the value; 0 if it is exact.
    """

    value: float
    standard_error: float


def top_eigenpairs(
    operator: TangentOperator,
    k: int,
    *,
    tolerance: float = 1e-4,
    max_products: int | None = None,
    seed: int = 0,
) -> Eigenpairs:
    """The k largest eigenvalues and eigenvectors of Θ, from products alone.

    A block Lanczos method with full reorthogonalization: the space grows by the
    residuals of the pairs that have not converged. It starts from k random vectors, so
    that it finds every copy of a multiple eigenvalue: those of wide networks come in
    clusters of c, of which iterations on one vector miss some. Takes about 4 to 8
    products for each pair, and memory for twice as many vectors of length m.

    Args:
        operator: Θ.
        k: Number of pairs, 1 to m.
        tolerance: A pair has converged when ‖Θv − λv‖ ≤ tolerance · λ, or is round-off
            of the largest, 4 ε √m λ₁. The error of λ is of second order in it.
        max_products: Products Θ·u after which to stop; default 20 k, but at least 100.
            With m of them the result is that of a dense eigensolver.
        seed: Of the vectors to start from.

    Returns:
        The pairs; NaN, and not converged, if Θ is not finite.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> operator = TangentOperator(net, torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        >>> top_eigenpairs(operator, 1).eigenvalues
        tensor([4.0000], dtype=torch.float64)

    References:
        Golub, Underwood 1977, "The block Lanczos method for computing eigenvalues";
        its convergence: Musco, Musco 2015, arXiv:1504.05477.
    """
    m = operator.shape[0]
    if not 1 <= k <= m:
        raise ValueError(
            f"top_eigenpairs: k={k}; expected 1 to {m}, the size of the kernel "
            f"({operator.n} examples × {operator.c} outputs)."
        )
    if max_products is None:
        max_products = max(100, 20 * k)
    if max_products < k:
        raise ValueError(
            f"top_eigenpairs: max_products={max_products}; expected at least k={k}."
        )
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"top_eigenpairs: tolerance={tolerance}; expected 0 or more.")
    size = min(m, max_products)
    new = torch.randn(m, k, generator=torch.Generator().manual_seed(seed))
    new = new.to(operator.device, operator.dtype)
    basis = images = new[:, :0]
    floor = 4 * torch.finfo(operator.dtype).eps * m**0.5
    with operator:
        while True:
            new = _orthonormal(new, basis)
            basis = torch.cat([basis, new], 1)
            images = torch.cat([images, operator.ntk_vp(new)], 1)
            projected = widened(basis.mT @ images)
            if not projected.isfinite().all():
                nothing = projected.new_full((k,), torch.nan)
                vectors = basis.new_full((m, k), torch.nan)
                return Eigenpairs(nothing, vectors, nothing.clone(), False)
            values, rotation = torch.linalg.eigh((projected + projected.mT) / 2)
            values = values.flip(0)[:k]
            rotation = rotation.flip(1)[:, :k].to(basis)
            vectors = basis @ rotation
            errors = images @ rotation - vectors * values.to(basis)
            residuals = torch.linalg.vector_norm(widened(errors), dim=0)
            loose = residuals > tolerance * values.abs() + floor * values[0].abs()
            room = size - basis.shape[1]
            if not loose.any() or not room:
                return Eigenpairs(values, vectors, residuals, not loose.any())
            new = errors[:, loose.to(errors.device)][:, :room]


def _orthonormal(
    new: Float[Tensor, "m b"], basis: Float[Tensor, "m j"]
) -> Float[Tensor, "m b"]:
    """An orthonormal basis of what the new vectors add to the old ones."""
    # Twice: the first pass leaves the round-off of what it took away.
    for _ in range(2):
        new = torch.linalg.qr(new - basis @ (basis.mT @ new)).Q
    return new


def trace_estimate(
    operator: TangentOperator, samples: int | None = None, *, seed: int = 0
) -> TraceEstimate:
    """Tr Θ = Σᵢ ‖√Λ Jᵀeᵢ‖², exactly or from random vectors.

    Without `samples` every row of J takes a backward pass. With them, Hutchinson's
    estimator: the mean of zᵀΘz = ‖√Λ Jᵀz‖² over vectors z of random signs, one backward
    pass through the whole batch each; its variance is 2 Σ_{i≠j} Θᵢⱼ² / samples. Neither
    needs J·v, so that both go where `TangentOperator.jvp` cannot.

    The sum over the diagonal of the traced NTK is Tr Θ / c.

    Args:
        operator: Θ.
        samples: Number of random vectors, at least 2; None for the exact trace.
        seed: Of the random vectors.

    Returns:
        The trace and its standard error; NaN if Θ is not finite.

    Raises:
        ValueError: If there are too few samples to tell the error.

    Example:
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> operator = TangentOperator(net, torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        >>> trace_estimate(operator)
        TraceEstimate(value=5.0, standard_error=0.0)

    References:
        Hutchinson 1990; its variance: Avron, Toledo 2011, doi:10.1145/1944345.1944349.
    """
    if samples is None:
        return TraceEstimate(float(widened(operator.diagonal()).sum()), 0.0)
    if samples < 2:
        raise ValueError(
            f"trace_estimate: samples={samples}; expected at least 2, because the "
            "error is told from their spread, or None for the exact trace."
        )
    generator = torch.Generator().manual_seed(seed)
    z = random_signs((operator.shape[0], samples), generator)
    values = widened(operator.quadratic_form(z))
    error = values.std() / samples**0.5
    return TraceEstimate(float(values.mean()), float(error))


def random_signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Rademacher vectors: +1 and -1 with equal probability."""
    return torch.randint(2, shape, generator=generator) * 2.0 - 1

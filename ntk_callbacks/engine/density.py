"""Spectral density of a kernel that is never formed."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_callbacks.engine.matrix_free import random_signs
from ntk_callbacks.engine.products import TangentOperator
from ntk_callbacks.layout import widened


@dataclass(frozen=True, slots=True)
class SpectralDensity:
    """How the m eigenvalues of Θ are distributed.

    Args:
        grid: Equally spaced eigenvalues, in ascending order.
        density: Density at each of them, normalized: its integral over the grid is 1.
        nodes: Eigenvalues of the quadrature, in ascending order.
        weights: The share of the m eigenvalues that each node stands for; they add up
            to 1. Sums over nodes give moments, and histograms on any axis.
    """

    grid: Float[Tensor, " g"]
    density: Float[Tensor, " g"]
    nodes: Float[Tensor, " q"]
    weights: Float[Tensor, " q"]


def spectral_density(
    operator: TangentOperator,
    *,
    samples: int = 8,
    steps: int = 64,
    width: float = 0.01,
    seed: int = 0,
) -> SpectralDensity:
    """Density of the m eigenvalues of Θ, by stochastic Lanczos quadrature.

    Each random vector z gives, after `steps` products Θ·u, the Gauss quadrature of the
    measure Σᵢ (zᵀvᵢ)² δ(λ − λᵢ) / m, whose mean over z is the density of eigenvalues.
    The first 2·steps − 1 moments of each are exact; every eigenvalue becomes a Gaussian
    of the given width. Costs samples · min(steps, m) products, and memory for `steps`
    vectors of length m.

    Args:
        operator: Θ.
        samples: Number of random vectors.
        steps: Lanczos steps of each, with full reorthogonalization.
        width: Standard deviation of the Gaussians, as a share (0.001 to 1) of the
            distance from the smallest to the largest node.
        seed: Of the random vectors.

    Returns:
        The density on a grid and the quadrature it was drawn from, in float64; NaN if
        Θ is not finite.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> operator = TangentOperator(net, torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        >>> found = spectral_density(operator)
        >>> (found.nodes * found.weights).sum()  # the mean eigenvalue
        tensor(2.5000, dtype=torch.float64)

    References:
        Ubaru, Chen, Saad 2017, doi:10.1137/16M1104974; for neural networks: Ghorbani,
        Krishnan, Xiao 2019, arXiv:1901.10159, algorithm 1.
    """
    if samples < 1 or steps < 1 or not 0.001 <= width <= 1:
        raise ValueError(
            f"spectral_density: samples={samples}, steps={steps}, width={width}; "
            "expected at least 1 sample and 1 step, and a width of 0.001 to 1."
        )
    generator = torch.Generator().manual_seed(seed)
    m = operator.shape[0]
    with operator:
        parts = [
            _quadrature(operator, random_signs((m,), generator), min(steps, m))
            for _ in range(samples)
        ]
    nodes, order = torch.cat([part[0] for part in parts]).sort()
    weights = torch.cat([part[1] for part in parts])[order] / samples
    low, high = float(nodes[0]), float(nodes[-1])
    span = high - low or abs(high) or 1.0
    deviation = width * span
    # Four points to a deviation, and five deviations beyond either end.
    points = math.ceil(4 * (1 / width + 10)) + 1
    grid = low + deviation * (torch.arange(points).to(nodes) / 4 - 5)
    if not math.isfinite(low + high):
        grid = torch.full_like(grid, torch.nan)
    density = torch.zeros_like(grid)
    for node, weight in zip(nodes, weights, strict=True):
        density += weight * torch.exp(-(((grid - node) / deviation) ** 2) / 2)
    return SpectralDensity(
        grid, density / torch.trapezoid(density, grid), nodes, weights
    )


def _quadrature(
    operator: TangentOperator, start: Float[Tensor, " m"], steps: int
) -> tuple[Float[Tensor, " q"], Float[Tensor, " q"]]:
    """Nodes and weights of the spectral measure of one vector."""
    q = start.to(operator.device, operator.dtype)
    q = q / q.norm()
    basis = q[:, None][:, :0]
    diagonal, beside = [], []
    for _ in range(steps):
        basis = torch.cat([basis, q[:, None]], 1)
        image = operator.ntk_vp(q)
        diagonal.append(q @ image)
        for _ in range(2):  # the first pass leaves the round-off of what it took away
            image = image - basis @ (basis.mT @ image)
        beside.append(image.norm())
        largest = torch.stack([*diagonal, *beside]).abs().max()
        if not beside[-1] > torch.finfo(q.dtype).eps * len(q) ** 0.5 * largest:
            break  # the vectors so far span an invariant space, or nothing is finite
        q = image / beside[-1]
    alpha = widened(torch.stack(diagonal))
    if not alpha.isfinite().all():
        return alpha.new_full((steps,), torch.nan), alpha.new_full((steps,), torch.nan)
    beta = torch.diag(widened(torch.stack(beside))[:-1], 1)
    nodes, vectors = torch.linalg.eigh(torch.diag(alpha) + beta + beta.mT)
    return nodes, vectors[0].square()

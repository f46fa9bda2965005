"""Mean and covariance of infinitely wide networks, trained or conditioned."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Num
from torch import Tensor

from ntk_callbacks.dynamics.function_space import (
    Times,
    finite,
    kernel_matrix,
    moments,
)
from ntk_callbacks.dynamics.modes import Eigenmodes, spectrum


@dataclass(frozen=True, slots=True)
class Gaussian:
    """A normal distribution of outputs on N points, in float64.

    Attributes:
        mean: `(N,)` or `(N, c)` as the targets were; with a leading axis for several
            times.
        covariance: `(N, N)`, of each output; outputs are independent. Symmetric, and
            positive semi-definite to round-off.

    Example:
        >>> prior = ensemble(torch.eye(2), torch.eye(2), torch.ones(1), 0.0)
        >>> prior.mean, prior.covariance.diagonal()
        (tensor([0., 0.], dtype=torch.float64), tensor([1., 1.], dtype=torch.float64))
    """

    mean: Float[Tensor, "..."]
    covariance: Float[Tensor, "*times N N"]


def ensemble(
    nngp: Float[Tensor, "..."],
    ntk: Float[Tensor, "..."],
    y: Num[Tensor, "n *c"],
    t: Times,
) -> Gaussian:
    """Outputs at time t of gradient flow over random initializations of a wide network.

    At initialization f₀ is normal with mean 0 and the NNGP kernel K as covariance; the
    flow on ½ Σ (f − y)² with the constant kernel Θ is linear in f₀, so that f(t) is
    normal too, with X the training set and A = Θ(·, X) Θ(X, X)⁻¹ (I − e^(−Θt))::

        mean = A y,    covariance = (I − A) K (I − A)ᵀ

    which is computed as a square and not as the difference of its terms. It is no
    Bayesian posterior (that is `nngp_posterior`) unless Θ is proportional to K.

    Args:
        nngp: K on the n training points followed by any others, one output, `(N, N)`.
        ntk: Θ on the same points.
        y: Targets of the first n points, `(n,)` or `(n, c)`.
        t: Time ≥ 0 in the units of `gradient_flow`, or several; `math.inf` is allowed.

    Returns:
        Mean and covariance on all N points, training points first.

    Raises:
        ValueError: If a kernel is not symmetric and positive semi-definite, shapes do
            not fit, something is not finite, or a time is negative.

    Example:
        >>> kernel = torch.tensor([[1.0, 0.5], [0.5, 1.0]]).double()
        >>> trained = ensemble(kernel, 2 * kernel, torch.ones(1).double(), math.inf)
        >>> trained.mean
        tensor([1.0000, 0.5000], dtype=torch.float64)
        >>> trained.covariance.diagonal()
        tensor([0.0000, 0.7500], dtype=torch.float64)

    References:
        Lee et al. 2019, arXiv:1902.06720, section 2.3.1.
    """
    who = "ensemble"
    times, scalar = moments(who, t)
    root, _ = _root(who, "nngp", nngp)
    kernel = kernel_matrix(who, ntk)
    if kernel.shape != root.shape:
        raise ValueError(
            f"{who}: nngp has shape {tuple(nngp.shape)}, ntk {tuple(ntk.shape)}; "
            "expected both on the same points."
        )
    targets = _targets(who, y, kernel)
    n = len(targets)
    _root(who, "ntk", ntk)
    modes = spectrum(who, kernel[:n, :n], torch.finfo(ntk.dtype).eps)
    response = modes.response(times)[:, None, :]
    train = (modes.directions * modes.learned(times)[:, None, :]) @ modes.directions.mT
    test = (kernel[n:, :n] @ modes.directions * response) @ modes.directions.mT
    # On the training set what is left keeps its precision where little is left.
    left = (modes.directions * modes.decay(times)[:, None, :]) @ modes.directions.mT
    start = torch.cat([left @ root[:n], root[n:] - test @ root[:n]], 1)
    mean = torch.cat([train, test], 1) @ targets.reshape(n, -1)
    mean = mean.reshape(len(times), len(kernel), *targets.shape[1:])
    covariance = _square(start)
    return Gaussian(mean[0], covariance[0]) if scalar else Gaussian(mean, covariance)


def nngp_posterior(
    nngp: Float[Tensor, "..."], y: Num[Tensor, "n *c"], *, noise: float = 0.0
) -> Gaussian:
    """Bayesian posterior of an infinitely wide network, f given y = f(X) + noise.

    K(·, X) (K(X, X) + σ²)⁻¹ y and K − K(·, X) (K(X, X) + σ²)⁻¹ K(X, ·). Without noise
    also the ensemble that trains its last layer only, at t = ∞.

    Args:
        nngp: K on the n training points followed by any others, one output, `(N, N)`.
        y: Targets of the first n points, `(n,)` or `(n, c)`.
        noise: Variance σ² ≥ 0 of the noise on the targets.

    Returns:
        Mean and covariance of f, without the noise, on all N points.

    Raises:
        ValueError: If the kernel is not symmetric and positive semi-definite, shapes do
            not fit, something is not finite, or the noise is negative.

    Example:
        >>> kernel = torch.tensor([[1.0, 0.5], [0.5, 1.0]]).double()
        >>> nngp_posterior(kernel, torch.ones(1).double(), noise=1.0).mean
        tensor([0.5000, 0.2500], dtype=torch.float64)

    References:
        Lee et al. 2018, arXiv:1711.00165; Rasmussen, Williams 2006, equation 2.25.
    """
    who = "nngp_posterior"
    if not 0 <= noise < math.inf:
        raise ValueError(f"{who}: noise={noise}; expected a finite variance ≥ 0.")
    root, kernel = _root(who, "nngp", nngp)
    targets = _targets(who, y, kernel)
    n = len(targets)
    modes = spectrum(who, kernel[:n, :n], torch.finfo(nngp.dtype).eps)
    values = modes.eigenvalues
    null = values + noise <= (0 if noise else modes.cutoff)
    inverse = torch.where(null, 0, 1 / (values + noise).masked_fill(null, 1))
    left = torch.where(null, 1, noise * inverse)
    test = _between(kernel[n:, :n] @ modes.directions, inverse, modes)
    rows = [
        _between(modes.directions, left, modes) @ root[:n],
        root[n:] - test @ root[:n],
    ]
    train = _between(modes.directions, values * inverse, modes)
    gain = torch.cat([train, test])
    # The noise of the targets, through the same linear map, is the second square.
    covariance = _square(torch.cat([torch.cat(rows), math.sqrt(noise) * gain], 1))
    mean = (gain @ targets.reshape(n, -1)).reshape(-1, *targets.shape[1:])
    return Gaussian(mean, covariance)


def _between(left: Tensor, middle: Tensor, modes: Eigenmodes) -> Tensor:
    return (left * middle) @ modes.directions.mT


def _square(root: Float[Tensor, "*times N r"]) -> Float[Tensor, "*times N N"]:
    product = root @ root.mT
    return product.triu() + product.triu(1).mT


def _root(who: str, name: str, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """R with R Rᵀ = K, and K itself."""
    matrix = kernel_matrix(f"{who} ({name})", kernel)
    modes = spectrum(f"{who} ({name})", matrix, torch.finfo(kernel.dtype).eps)
    return modes.directions * modes.eigenvalues.sqrt(), matrix


def _targets(who: str, y: Tensor, kernel: Tensor) -> Tensor:
    targets = finite(who, "y", y).to(kernel.device)
    if targets.ndim not in (1, 2) or not 0 < len(targets) <= len(kernel):
        raise ValueError(
            f"{who}: targets of shape {tuple(y.shape)} for kernels on {len(kernel)} "
            "points; expected (n,) or (n, c), and the kernels on these n training "
            "points followed by any others."
        )
    return targets

"""Kernel regression: where training on the squared error ends, and with a ridge."""

import math

import torch
from jaxtyping import Float, Num
from torch import Tensor

from ntk_callbacks.dynamics.function_space import FunctionSpace, refuse_negative
from ntk_callbacks.dynamics.losses import loss_named
from ntk_callbacks.dynamics.modes import spectrum
from ntk_callbacks.layout import widened


def kernel_regression(
    ntk: Float[Tensor, "..."],
    y: Num[Tensor, "..."],
    ntk_test: Float[Tensor, "..."],
    *,
    ridge: float = 0.0,
    f0: Float[Tensor, "..."] | None = None,
    f0_test: Float[Tensor, "..."] | None = None,
) -> Float[Tensor, "..."]:
    """Predictions Θ(test, train) (Θ + ridge·I)⁻¹ y on the test set.

    Minimizes ½ Σ (f − y)² + ½ ridge ‖f‖²_Θ. Without a ridge the predictions are those
    of gradient flow from zero at t = ∞; a kernel that is singular within the round-off
    of its dtype then gives those of least norm. With `f0` and `f0_test` the function
    fits y − f₀ and is added to f₀: training that starts at f₀.

    Args:
        ntk: Θ on the training set: `(n, n, c, c)`, `(n, n, c)`, a matrix `(n·c, n·c)`,
            or `(n, n)` for outputs that share one kernel.
        y: Targets, `(n, c)` or flat.
        ntk_test: Θ(test, train).
        ridge: Added to the diagonal of Θ, ≥ 0, in its units.
        f0: Outputs of the untrained model; zero by default.
        f0_test: The same on the test set; needed with `f0`.

    Returns:
        Predictions in float64: `(n_test, c)`, or flat if `y` is; of the shape of
        `f0_test` if that is given.

    Raises:
        ValueError: If the kernel is not symmetric and positive semi-definite, shapes
            do not fit, something is not finite, or the ridge is negative.

    Example:
        >>> ntk = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> kernel_regression(ntk, torch.tensor([3.0, 0.0]), ntk[:1], ridge=1.0)
        tensor([1.8750], dtype=torch.float64)

    References:
        Jacot et al. 2018, arXiv:1806.07572; Arora et al. 2019, arXiv:1904.11955.
    """
    who = "kernel_regression"
    if not 0 <= ridge < math.inf:
        raise ValueError(f"{who}: ridge={ridge}; expected a finite number ≥ 0.")
    if (f0 is None) != (f0_test is None):
        raise ValueError(f"{who}: f0 and f0_test belong together; got only one.")
    if f0 is None or f0_test is None:
        f0 = torch.zeros_like(widened(y))
        f0_test = f0.new_zeros(_test_shape(ntk, y, ntk_test))
    space = FunctionSpace.of(who, ntk, f0, ntk_test, f0_test)
    targets = loss_named(who, "mse").targets(who, space.outputs(space.f0), y)
    coefficients = _solved(space, space.columns(targets) - space.f0, ridge)
    return (space.f0_test + space.ntk_test @ coefficients).reshape(f0_test.shape)


def _solved(space: FunctionSpace, residual: Tensor, ridge: float) -> Tensor:
    """(Θ + ridge·I)⁻¹ residual by Cholesky, by the eigenvalues if Θ is singular."""
    refuse_negative("kernel_regression", space.ntk, space.precision)
    m = len(space.ntk)
    shifted = space.ntk + ridge * torch.eye(m).to(space.ntk)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    # Without a ridge the last pivots of a singular matrix are round-off.
    room = 4 * math.sqrt(m) * space.precision * shifted.diagonal().amax()
    if not failed and (ridge or factor.diagonal().square().amin() > room):
        return torch.cholesky_solve(residual, factor)
    modes = spectrum("kernel_regression", space.ntk, space.precision)
    # Cholesky fails on a ridge only if that is below round-off: there is none then.
    null = modes.eigenvalues <= modes.cutoff
    inverse = torch.where(null, 0, 1 / modes.eigenvalues.masked_fill(null, 1))
    return modes.directions @ (inverse[:, None] * (modes.directions.mT @ residual))


def _test_shape(ntk: Tensor, y: Tensor, ntk_test: Tensor) -> tuple[int, ...]:
    if ntk_test.ndim > 2:
        outputs = ntk_test.shape[0], ntk_test.shape[-1]
        return (outputs[0] * outputs[1],) if y.ndim == 1 else outputs
    if y.ndim > 1 and ntk.ndim == 2 and len(ntk) == len(y):
        return len(ntk_test), *y.shape[1:]
    c = math.prod(y.shape[1:])
    if y.ndim > 1 and c and len(ntk_test) % c == 0:
        return len(ntk_test) // c, *y.shape[1:]
    return (len(ntk_test),)

"""Training with infinitesimal steps, as a constant kernel predicts it."""

import torch
from jaxtyping import Float, Num
from torch import Tensor

from ntk_callbacks.dynamics.function_space import (
    FunctionSpace,
    Times,
    Trajectory,
    moments,
    refuse_negative,
)
from ntk_callbacks.dynamics.losses import LossName, loss_named
from ntk_callbacks.dynamics.modes import spectrum
from ntk_callbacks.dynamics.runge_kutta import solution


def gradient_flow(
    ntk: Float[Tensor, "..."],
    f0: Float[Tensor, "..."],
    y: Num[Tensor, "..."],
    t: Times,
    *,
    loss: LossName = "mse",
    ntk_test: Float[Tensor, "..."] | None = None,
    f0_test: Float[Tensor, "..."] | None = None,
) -> Trajectory:
    """Outputs at time t of gradient flow, ḟ = −Θ ∇_f L with a constant kernel.

    For L = ½ Σ (f − y)² in closed form, by the eigendirections of Θ::

        f(t) = y + e^(−Θt) (f₀ − y)
        f(t) = f₀ + Θ(test, train) Θ⁻¹ (I − e^(−Θt)) (y − f₀)      on the test set

    Directions in which Θ is zero stay where they are; at t = ∞ those are the ones below
    4 √m ε λ_max, ε that of the kernel's dtype. For L = −Σ log softmax(f)[y] by
    integration, to about 1e-9, at a cost that grows with λ_max t.

    The time of k small steps is the learning rate times k for a loss that is a sum over
    the examples. For a loss that is s times the sum multiply t by s: 1/N for means over
    N examples (neural-tangents: ½ mean over N·c, s = 1/(N·c)), 2/(N·c) for `MSELoss`.

    Args:
        ntk: Θ on the training set: `(n, n, c, c)`, `(n, n, c)`, a matrix `(n·c, n·c)`,
            or `(n, n)` for outputs that share one kernel.
        f0: Outputs before training, `(n, c)`, or flat.
        y: Targets of the shape of `f0`; for cross-entropy integer labels `(n,)` or
            probabilities `(n, c)`.
        t: Time ≥ 0, or several. `math.inf` is allowed for `"mse"`.
        loss: `"mse"` or `"cross_entropy"`.
        ntk_test: Θ(test, train), one row for each output that is watched.
        f0_test: The watched outputs before training.

    Returns:
        Outputs in float64, of the shapes of `f0` and `f0_test`, with a leading axis if
        several times were asked for.

    Raises:
        ValueError: If the kernel is not symmetric and positive semi-definite, shapes
            do not fit, something is not finite, a time is negative, or the loss is
            unknown.

    Example:
        >>> ntk, y = torch.eye(2).double(), torch.tensor([1.0, -1.0]).double()
        >>> gradient_flow(ntk, torch.zeros(2), y, [0.0, 1.0]).train
        tensor([[ 0.0000,  0.0000],
                [ 0.6321, -0.6321]], dtype=torch.float64)

    References:
        Jacot et al. 2018, arXiv:1806.07572; Lee et al. 2019, arXiv:1902.06720.
    """
    who = "gradient_flow"
    space = FunctionSpace.of(who, ntk, f0, ntk_test, f0_test)
    targets = loss_named(who, loss).targets(who, space.outputs(space.f0), y)
    times, scalar = moments(who, t)
    flow = _squared_error if loss == "mse" else _cross_entropy
    train, test = flow(space, targets, times.to(space.ntk.device))
    return space.trajectory(train, test, scalar)


def _squared_error(
    space: FunctionSpace, targets: Tensor, times: Tensor
) -> tuple[Tensor, Tensor]:
    modes = spectrum("gradient_flow", space.ntk, space.precision)
    to_learn = modes.directions.mT @ (space.columns(targets) - space.f0)
    train = modes.directions @ (modes.learned(times)[:, :, None] * to_learn)
    seen = space.ntk_test @ modes.directions
    test = seen @ (modes.response(times)[:, :, None] * to_learn)
    return space.f0 + train, space.f0_test + test


def _cross_entropy(
    space: FunctionSpace, targets: Tensor, times: Tensor
) -> tuple[Tensor, Tensor]:
    who, m = "gradient_flow", len(space.ntk)
    if not times.isfinite().all():
        raise ValueError(
            f"{who}: t is infinite, where the logits of separable classes are infinite "
            "too; expected finite times for cross-entropy."
        )
    refuse_negative(who, space.ntk, space.precision)
    gradient = loss_named(who, "cross_entropy").gradient
    # All outputs that are watched move along, so that the tolerance is kept on each.
    kernel = torch.cat([space.ntk, space.ntk_test])

    def velocity(f: Tensor) -> Tensor:
        residual = gradient(space.outputs(f[:m]), targets)
        return -kernel @ space.columns(residual)

    f = solution(velocity, torch.cat([space.f0, space.f0_test]), times)
    return f[:, :m], f[:, m:]

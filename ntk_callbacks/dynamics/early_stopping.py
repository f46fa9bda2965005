"""When to stop: the time at which the predicted error on held-out examples is least."""

import math

import torch
from jaxtyping import Float, Num
from torch import Tensor

from ntk_callbacks.dynamics.function_space import FunctionSpace
from ntk_callbacks.dynamics.losses import loss_named
from ntk_callbacks.dynamics.modes import Eigenmodes, spectrum

_TIMES_PER_DECADE = 100


def early_stopping_time(
    ntk: Float[Tensor, "..."],
    f0: Float[Tensor, "..."],
    y: Num[Tensor, "..."],
    *,
    ntk_test: Float[Tensor, "..."],
    f0_test: Float[Tensor, "..."],
    y_test: Num[Tensor, "..."],
) -> Float[Tensor, ""]:
    """Time of gradient flow on ½ Σ (f − y)² with the least ½ Σ (f − y)² on a test set.

    The test error is a quadratic form in the e^(−λᵢt). The zeros of its derivative are
    bracketed on a grid of 100 times per decade, from 1e-4/λ_max to 40/λ_min, and
    refined by bisection; the least value among them, t = 0 and t = ∞ is taken.
    `gradient_flow` gives the outputs there. Units of time as there.

    Args:
        ntk: Θ on the training set, as in `gradient_flow`.
        f0: Outputs before training.
        y: Targets of the shape of `f0`.
        ntk_test: Θ(test, train).
        f0_test: Outputs on the test set before training.
        y_test: Targets of the shape of `f0_test`.

    Returns:
        Time in [0, ∞], float64; ∞ if the error falls to the end, the earliest of
        several equally good ones.

    Raises:
        ValueError: As `gradient_flow`.

    Example:
        >>> one = torch.ones(1, 1).double()
        >>> early_stopping_time(one, one * 0, one, ntk_test=one, f0_test=one * 0,
        ...                     y_test=one / 2).exp()
        tensor(2.0000, dtype=torch.float64)

    References:
        Yao, Rosasco, Caponnetto 2007, "On early stopping in gradient descent learning";
        Advani, Saxe 2017, arXiv:1710.03667.
    """
    who = "early_stopping_time"
    space = FunctionSpace.of(who, ntk, f0, ntk_test, f0_test)
    mse = loss_named(who, "mse")
    targets = mse.targets(who, space.outputs(space.f0), y)
    start = space.f0_test.reshape(f0_test.shape)
    missing = (mse.targets(who, start, y_test) - start).reshape(space.f0_test.shape)
    modes = spectrum(who, space.ntk, space.precision)
    error = _TestError(modes, space, space.columns(targets) - space.f0, missing)
    rates = modes.eigenvalues[modes.eigenvalues > modes.cutoff]
    never = modes.eigenvalues.new_zeros(1)
    if not len(rates):
        return never[0]
    first, last = math.log10(1e-4 / rates[0]), math.log10(40 / rates[-1])
    count = math.ceil(_TIMES_PER_DECADE * (last - first))
    grid = torch.logspace(first, last, count).to(rates)
    slopes = error.slope(grid)
    minima = (slopes[:-1] < 0) & (slopes[1:] >= 0)
    found = error.zero_of_slope(grid[:-1][minima], grid[1:][minima])
    candidates = torch.cat([never, found, never + torch.inf])
    values = error(candidates)
    # Equal within round-off is equal: the earliest wins.
    good = values <= values.min() + 1e-14 * values[0]
    return candidates[good].min()


class _TestError:
    """½ ‖y − f(t)‖² on the test set, up to its value at t = 0: ½ φᵀGφ − h·φ, ≥ −that.

    φᵢ = (1 − e^(−λᵢt))/λᵢ is how much of mode i was pushed onto the test outputs.
    """

    def __init__(
        self, modes: Eigenmodes, space: FunctionSpace, residual: Tensor, missing: Tensor
    ) -> None:
        to_learn = modes.directions.mT @ residual
        seen = space.ntk_test @ modes.directions
        self.modes = modes
        self.gram = (seen.mT @ seen) * (to_learn @ to_learn.mT)
        self.pull = ((seen.mT @ missing) * to_learn).sum(1)
        self.start = missing.square().sum() / 2

    def __call__(self, times: Tensor) -> Tensor:
        phi = self.modes.response(times)
        quadratic = ((phi @ self.gram) * phi).sum(1) / 2
        return self.start + quadratic - phi @ self.pull

    def slope(self, times: Tensor) -> Tensor:
        """Its derivative by t."""
        force = self.modes.response(times) @ self.gram - self.pull
        return (force * torch.exp(-times[:, None] * self.modes.eigenvalues)).sum(1)

    def zero_of_slope(self, left: Tensor, right: Tensor) -> Tensor:
        """The minima between times where it falls and times where it does not."""
        for _ in range(60):
            middle = (left * right).sqrt()
            falls = self.slope(middle) < 0
            left, right = (
                torch.where(falls, middle, left),
                torch.where(falls, right, middle),
            )
        return (left * right).sqrt()

"""How far training moves the parameters, as the kernel alone foretells."""

import math

from jaxtyping import Float, Num
from torch import Tensor

from ntk_callbacks.dynamics.function_space import FunctionSpace, Times, moments
from ntk_callbacks.dynamics.losses import loss_named
from ntk_callbacks.dynamics.modes import spectrum


def parameter_distance(
    ntk: Float[Tensor, "..."],
    f0: Float[Tensor, "..."],
    y: Num[Tensor, "..."],
    t: Times = math.inf,
) -> Float[Tensor, "*times"]:
    """How far the parameters go, ‖θ(t) − θ(0)‖ under gradient flow on ½ Σ (f − y)².

    With the residual r = f₀ − y in the eigendirections of Θ = J Jᵀ::

        ‖Δθ‖² = Σᵢ ((1 − e^(−λᵢt)) rᵢ)²/λᵢ,      √(rᵀ Θ⁻¹ r) for t = ∞

    Exact for a model linear in its parameters. A wide network goes the same way in its
    lazy phase, of order 1 at any width; relative to ‖θ₀‖ it is what
    `params/displacement` measures.

    Args:
        ntk: Θ on the training set: `(n, n, c, c)`, `(n, n, c)`, a matrix `(n·c, n·c)`,
            or `(n, n)` for outputs that share one kernel.
        f0: Outputs before training, `(n, c)` or flat.
        y: Targets of the shape of `f0`.
        t: Time ≥ 0 in the units of `gradient_flow`, or several; by default to the end
            of training.

    Returns:
        A distance ≥ 0 for each time, float64, in the units of the parameters. What a
        singular kernel cannot see moves nothing.

    Raises:
        ValueError: If the kernel is not symmetric and positive semi-definite, shapes
            do not fit, something is not finite, or a time is negative.

    Example:
        A slow direction costs more of the way, 3² and (1/√0.25)²:

        >>> import torch
        >>> ntk = torch.diag(torch.tensor([1.0, 0.25]))
        >>> parameter_distance(ntk, torch.zeros(2), torch.tensor([3.0, 1.0])) ** 2
        tensor(13.0000, dtype=torch.float64)

    References:
        Lee et al. 2019, arXiv:1902.06720; Chizat, Oyallon, Bach 2019, arXiv:1812.07956.
    """
    who = "parameter_distance"
    times, scalar = moments(who, t)
    space = FunctionSpace.of(who, ntk, f0)
    targets = loss_named(who, "mse").targets(who, space.outputs(space.f0), y)
    modes = spectrum(who, space.ntk, space.precision)
    squares = modes.components(space.f0 - space.columns(targets)).square()
    squares = squares.reshape(len(modes.eigenvalues), -1).sum(1)
    # θ moves by Jᵀ times the time integral of the residual, (1 − e^(−λt))/λ of it.
    length = (modes.response(times).square() * modes.eigenvalues @ squares).sqrt()
    return length[0] if scalar else length

"""An ordinary differential equation, integrated to a tolerance."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

# Dormand and Prince 1980: fifth order, with a fourth-order result to compare it with.
# The last stage is taken at the new point and serves as the first of the next step.
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def solution(
    derivative: Callable[[Tensor], Tensor],
    start: Float[Tensor, "..."],
    times: Float[Tensor, " times"],
    *,
    tolerance: float = 1e-10,
) -> Float[Tensor, "times ..."]:
    """The solution of ẏ = F(y), y(0) = start, by an explicit Runge-Kutta method.

    Steps end on every time asked for, so that nothing is interpolated.

    Args:
        derivative: F, of a state and without time.
        start: y(0).
        times: Finite and ≥ 0, in any order.
        tolerance: Largest error of one step in any entry, relative to max(1, |y|).

    Returns:
        y at each of the times.

    Raises:
        ArithmeticError: If the state or its derivative stops being finite.

    References:
        Dormand, Prince 1980, "A family of embedded Runge-Kutta formulae".
    """
    y, now, slope = start, 0.0, derivative(start)
    reached: dict[float, Tensor] = {}
    step = _first_step(y, slope)
    for target in sorted(set(times.tolist())):
        while now < target:
            # A last stretch that is nearly a step is one, and not a step and a crumb.
            whole = now + 1.01 * step >= target
            h = target - now if whole else step
            slopes = [slope]
            for weights in _STAGES:
                y_next = y + h * _combined(weights, slopes)
                slopes.append(derivative(y_next))
            scale = tolerance * y.abs().maximum(y_next.abs()).clamp(min=1)
            error = (h * _combined(_ERROR, slopes) / scale).abs().max().item()
            if error <= 1:
                now = target if whole else now + h
                y, slope = y_next, slopes[-1]
            # NaN counts as too large an error.
            growth = 0.9 * max(error, 1e-10) ** -0.2 if error < torch.inf else 0.2
            if error > 1 or not whole or growth < 1:
                step = h * min(max(growth, 0.2), 5.0)
            if not step > 1e-14 * max(now, 1e-100):
                raise ArithmeticError(
                    f"the solution stopped being finite at time {now:.6g}."
                )
        reached[target] = y
    if not reached:
        return start.new_zeros(0, *start.shape)
    return torch.stack([reached[time] for time in times.tolist()])


def _first_step(y: Tensor, slope: Tensor) -> float:
    speed = (slope.abs() / y.abs().clamp(min=1)).max().item() if slope.numel() else 0
    return 0.01 / speed if speed else 1.0


def _combined(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    total = weights[0] * slopes[0]
    for weight, slope in zip(weights[1:], slopes[1:], strict=True):
        if weight:
            total = total + weight * slope
    return total

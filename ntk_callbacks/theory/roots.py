"""Roots of many functions at once, each between two points where its sign differs."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_STEPS = 200


def bracketed_root(
    function: Callable[[Tensor], Tensor],
    low: Float[Tensor, "..."],
    high: Float[Tensor, "..."],
) -> Float[Tensor, "..."]:
    """x between `low` and `high` with f(x) = 0, to the last digits, elementwise.

    Inverse quadratic interpolation where it is safe, halving where it is not.

    Args:
        function: f, elementwise; called with tensors of the shape of `low`.
        low: One end.
        high: The other end, where f is 0 or has the other sign.

    Returns:
        Roots in float64; an end if f is 0 there or does not change its sign.

    Example:
        >>> zero = torch.zeros(2, dtype=torch.float64)
        >>> squares = torch.tensor([2.0, 9.0], dtype=torch.float64)
        >>> bracketed_root(lambda x: x**2 - squares, zero, zero + 4)
        tensor([1.4142, 3.0000], dtype=torch.float64)

    References:
        Chandrupatla (1997), A new hybrid quadratic/bisection algorithm,
        doi:10.1016/s0965-9978(96)00051-8.
    """
    # a, b enclose the root and b is the newest; c is the end that b replaced.
    a, b = high.clone(), low.clone()
    f_a, f_b = function(a), function(b)
    c, f_c = a, f_a
    share = torch.full_like(a, 0.5)
    for _ in range(_STEPS):
        best = torch.where(f_a.abs() < f_b.abs(), a, b)
        f_best = torch.minimum(f_a.abs(), f_b.abs())
        slack = 2e-16 * best.abs() + 1e-300
        gap = (b - a).abs()
        done = (f_best == 0) | (gap <= 2 * slack) | (f_a * f_b > 0) | f_best.isnan()
        if done.all():
            break
        least = torch.where(done, 0.5, slack / gap)
        x = a + torch.clamp(share, least, 1 - least) * (b - a)
        f_x = torch.where(done, f_best, function(torch.where(done, best, x)))
        same = f_x.sign() == f_a.sign()
        new_c, new_f_c = torch.where(same, a, b), torch.where(same, f_a, f_b)
        new_b, new_f_b = torch.where(same, b, a), torch.where(same, f_b, f_a)
        c, f_c = torch.where(done, c, new_c), torch.where(done, f_c, new_f_c)
        b, f_b = torch.where(done, b, new_b), torch.where(done, f_b, new_f_b)
        a, f_a = torch.where(done, a, x), torch.where(done, f_a, f_x)
        share = _share(a, b, c, f_a, f_b, f_c)
    return torch.where(f_a.abs() < f_b.abs(), a, b)


def _share(
    a: Tensor, b: Tensor, c: Tensor, f_a: Tensor, f_b: Tensor, f_c: Tensor
) -> Tensor:
    """Where between a and b to look next."""
    place = (a - b) / (c - b)
    height = (f_a - f_b) / (f_c - f_b)
    safe: Bool[Tensor, "..."] = (height**2 < place) & ((1 - height) ** 2 < 1 - place)
    inverse = f_a / (f_b - f_a) * (f_c / (f_b - f_c)) + (c - a) / (b - a) * (
        f_a / (f_c - f_a)
    ) * (f_b / (f_c - f_b))
    return torch.where(safe & inverse.isfinite(), inverse, 0.5)

"""Roots of many functions at once, each between two points where its sign differs."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

_STEPS = 200
_TINY = 1e-300


def bracketed_root(
    function: Callable[..., Tensor],
    low: Float[Tensor, "..."],
    high: Float[Tensor, "..."],
    *parameters: Float[Tensor, "..."],
    tolerance: float = 4e-16,
) -> Float[Tensor, "..."]:
    """Zeros of f between `low` and `high`, elementwise.

    Inverse quadratic interpolation where it is safe, halving where it is not; a root
    that is found is not evaluated again.

    Args:
        function: f(x, *parameters), elementwise over vectors.
        low: One end.
        high: The other end, where f is 0 or has the other sign; same shape.
        *parameters: What f depends on, of the shape of `low`.
        tolerance: Relative width of the bracket at which to stop.

    Returns:
        Roots in float64; an end if f is 0 there or does not change its sign.

    Example:
        >>> zero = torch.zeros(2, dtype=torch.float64)
        >>> squares = torch.tensor([2.0, 9.0], dtype=torch.float64)
        >>> bracketed_root(lambda x, s: x**2 - s, zero, zero + 4, squares)
        tensor([1.4142, 3.0000], dtype=torch.float64)

    References:
        Chandrupatla (1997), A new hybrid quadratic/bisection algorithm,
        doi:10.1016/s0965-9978(96)00051-8.
    """
    shape = low.shape
    # a and b enclose the root, a is the newer; c is the end that was given up.
    b, a = low.reshape(-1).clone(), high.reshape(-1).clone()
    arguments = [parameter.reshape(-1) for parameter in parameters]
    f_a, f_b = function(a, *arguments), function(b, *arguments)
    c, f_c = b, f_b
    share = torch.full_like(a, 0.5)
    roots = torch.empty_like(a)
    active = torch.arange(len(a))
    for _ in range(_STEPS):
        best = torch.where(f_a.abs() < f_b.abs(), a, b)
        roots[active] = best
        slack = tolerance / 2 * best.abs() + _TINY
        gap = (b - a).abs()
        open_ = (f_a * f_b < 0) & (gap > 2 * slack)
        if not open_.any():
            break
        a, b, c, f_a, f_b, f_c, share, active, least, *arguments = (
            values[open_]
            for values in (
                *(a, b, c, f_a, f_b, f_c, share, active, slack / gap),
                *arguments,
            )
        )
        x = a + share.clamp(min=least).minimum(1 - least) * (b - a)
        f_x = function(x, *arguments)
        same = f_x.sign() == f_a.sign()
        c, f_c = torch.where(same, a, b), torch.where(same, f_a, f_b)
        b, f_b = torch.where(same, b, a), torch.where(same, f_b, f_a)
        a, f_a = x, f_x
        share = _share(a, b, c, f_a, f_b, f_c)
    return roots.reshape(shape)


def _share(
    a: Tensor, b: Tensor, c: Tensor, f_a: Tensor, f_b: Tensor, f_c: Tensor
) -> Tensor:
    """Where between a and b to look next."""
    place = (a - b) / (c - b)
    height = (f_a - f_b) / (f_c - f_b)
    safe = (height**2 < place) & ((1 - height) ** 2 < 1 - place)
    inverse = f_a / (f_b - f_a) * (f_c / (f_b - f_c)) + (c - a) / (b - a) * (
        f_a / (f_c - f_a)
    ) * (f_b / (f_c - f_b))
    return torch.where(safe & inverse.isfinite(), inverse, 0.5)

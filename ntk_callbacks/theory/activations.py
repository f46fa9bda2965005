"""Activations by name or as callables, with derivatives.

An activation is a name in `ACTIVATIONS` or any elementwise function of a tensor. Names,
and the functions and modules of torch they stand for, bring closed forms where these
exist; everything else is integrated numerically.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ntk_callbacks.theory.closed_forms import Erf, PiecewiseLinear, Sin

Activation: TypeAlias = str | Callable[[Tensor], Tensor]
"""A name in `ACTIVATIONS`, or an elementwise function of a tensor."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": PiecewiseLinear(1.0, 0.0),
    "leaky_relu": PiecewiseLinear(1.0, 0.01),
    "abs": PiecewiseLinear(1.0, -1.0),
    "linear": PiecewiseLinear(1.0, 1.0),
    "identity": PiecewiseLinear(1.0, 1.0),
    "erf": Erf(),
    "sin": Sin(),
    "tanh": torch.tanh,
    "hard_tanh": functional.hardtanh,
    "sigmoid": torch.sigmoid,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "elu": functional.elu,
    "softplus": functional.softplus,
}
"""Name -> elementwise function; leaky ReLU with torch's slope of 0.01."""

_SAME: dict[Callable[..., Tensor], str] = {
    torch.relu: "relu",
    functional.relu: "relu",
    functional.leaky_relu: "leaky_relu",
    torch.abs: "abs",
    torch.erf: "erf",
    torch.sin: "sin",
}


def elementwise(activation: Activation) -> Callable[[Tensor], Tensor]:
    """The function an activation stands for, the one with closed forms if there is one.

    Args:
        activation: A name in `ACTIVATIONS` or an elementwise callable.

    Returns:
        An elementwise function.

    Raises:
        ValueError: If the name is unknown or the activation is not callable.

    Example:
        >>> elementwise(torch.relu)
        PiecewiseLinear(positive=1.0, negative=0.0)
    """
    if isinstance(activation, str) and activation in ACTIVATIONS:
        return ACTIVATIONS[activation]
    if isinstance(activation, str) or not callable(activation):
        raise ValueError(
            f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}, "
            "or an elementwise callable."
        )
    if isinstance(activation, nn.ReLU):
        return PiecewiseLinear(1.0, 0.0)
    if isinstance(activation, nn.LeakyReLU):
        return PiecewiseLinear(1.0, activation.negative_slope)
    try:
        known = _SAME.get(activation)
    except TypeError:  # not hashable
        known = None
    return ACTIVATIONS[known] if known else activation


def value_and_slope(
    activation: Callable[[Tensor], Tensor], x: Float[Tensor, "..."]
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """φ(x) and φ'(x), the latter by automatic differentiation.

    Args:
        activation: φ, elementwise.
        x: Arguments in float64.

    Returns:
        Two tensors of the shape of `x`, detached.

    Raises:
        ValueError: If φ changes the shape or the precision of its argument.
    """
    with torch.inference_mode(False), torch.enable_grad():
        inputs = x.detach().clone().requires_grad_()
        # A copy: the activation may work in place.
        values = activation(inputs.clone())
        if values.shape != x.shape or values.dtype != x.dtype:
            raise ValueError(
                f"the activation turns {tuple(x.shape)} {x.dtype} into "
                f"{tuple(values.shape)} {values.dtype}, expected an elementwise "
                "function that keeps shape and float64."
            )
        if not values.requires_grad:  # constant, or piecewise so: torch.sign
            return values, torch.zeros_like(values)
        (slopes,) = torch.autograd.grad(
            values.sum(), inputs, allow_unused=True, materialize_grads=True
        )
    return values.detach(), slopes


def check_elementwise(activation: Callable[[Tensor], Tensor]) -> None:
    """Refuse a function of a tensor whose entries depend on one another.

    Args:
        activation: φ.

    Raises:
        ValueError: If an entry of φ(x) changes when its neighbors do, or differs from
            one call to the next.
    """
    x = torch.linspace(-3.0, 2.9, 12, dtype=torch.float64)
    together = torch.stack(value_and_slope(activation, x))
    backward = torch.stack(value_and_slope(activation, x.flip(0))).flip(1)
    alone = torch.stack(value_and_slope(activation, x[4:5]))
    # NaNs are reported where they matter, with their place.
    if not torch.allclose(
        together, backward, rtol=1e-12, atol=1e-12, equal_nan=True
    ) or not torch.allclose(
        together[:, 4:5], alone, rtol=1e-12, atol=1e-12, equal_nan=True
    ):
        raise ValueError(
            "the activation is not elementwise or not deterministic: the same number "
            "gives different values next to different neighbors. Infinite-width "
            "kernels need φ(x) for each entry on its own (no softmax, no dropout)."
        )

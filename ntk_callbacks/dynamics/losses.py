"""Losses by what function space needs of them: targets, gradient and curvature.

Sums over the examples: ½ Σ (f − y)², and −Σ log softmax(f)[label]. A loss that is s
times such a sum (s = 1/N for a mean over N examples) trains as the sum does at s times
the learning rate, or after s times the time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from ntk_callbacks.dynamics.function_space import finite

LossName: TypeAlias = Literal["mse", "cross_entropy"]


def loss_gradient(
    f: Float[Tensor, "..."], y: Num[Tensor, "..."], *, loss: LossName = "mse"
) -> Float[Tensor, "..."]:
    """Gradient of the loss by the outputs: the residual that training works off.

    f − y for `"mse"`, ½ Σ (f − y)²; softmax(f) − y for `"cross_entropy"`, the sum over
    the examples. Divide by N for means over N examples.

    Args:
        f: Outputs, `(n, c)` or flat.
        y: Targets of the shape of `f`; for cross-entropy integer labels `(n,)` or
            probabilities `(n, c)`.
        loss: `"mse"` or `"cross_entropy"`.

    Returns:
        ∇_f L in float64, of the shape of `f`.

    Raises:
        ValueError: If the loss is unknown, the targets do not fit, or something is
            not finite.

    Example:
        >>> loss_gradient(torch.zeros(1, 2), torch.tensor([1]), loss="cross_entropy")
        tensor([[ 0.5000, -0.5000]], dtype=torch.float64)
    """
    part = loss_named("loss_gradient", loss)
    outputs = finite("loss_gradient", "f", f)
    return part.gradient(outputs, part.targets("loss_gradient", outputs, y))


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss of outputs and targets, summed over the examples.

    Attributes:
        targets: `(who, f, y)` -> y in float64, of the shape of `f`, or a ValueError.
        gradient: `(f, targets)` -> ∇_f L.
        curvature: `(f, v)` -> ∇²_f L · v.
    """

    targets: Callable[[str, Tensor, Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]
    curvature: Callable[[Tensor, Tensor], Tensor]


def loss_named(who: str, name: str) -> Loss:
    """The loss of that name; a ValueError lists the known ones."""
    if name not in LOSSES:
        raise ValueError(f"{who}: loss={name!r}; expected one of {sorted(LOSSES)}.")
    return LOSSES[name]


def _values(who: str, f: Tensor, y: Tensor) -> Tensor:
    if y.shape != f.shape:
        hint = "; for class labels pass torch.nn.functional.one_hot(y, c)"
        raise ValueError(
            f"{who}: the outputs have shape {tuple(f.shape)}, the targets "
            f"{tuple(y.shape)}; expected the same shape"
            f"{'' if y.is_floating_point() else hint}."
        )
    return finite(who, "y", y).to(f.device)


def _probabilities(who: str, f: Tensor, y: Tensor) -> Tensor:
    if f.ndim != 2 or f.shape[1] < 2:
        raise ValueError(
            f"{who}: the outputs have shape {tuple(f.shape)}; cross-entropy needs "
            "logits (n, c) with c ≥ 2."
        )
    n, c = f.shape
    if y.shape == (n,) and not y.is_floating_point():
        if n and not (y.min() >= 0 and y.max() < c):
            raise ValueError(
                f"{who}: labels from {y.min()} to {y.max()}; expected 0 … {c - 1}."
            )
        return nn.functional.one_hot(y.long(), c).to(f)
    if y.shape != f.shape:
        raise ValueError(
            f"{who}: targets of shape {tuple(y.shape)} and {y.dtype} for logits "
            f"{(n, c)}; expected integer labels ({n},) or probabilities {(n, c)}."
        )
    targets = finite(who, "y", y).to(f.device)
    # Probabilities in float32 add up to 1 within its round-off only.
    if not ((targets >= 0).all() and (targets.sum(1) - 1).abs().le(1e-5).all()):
        raise ValueError(f"{who}: target probabilities must be ≥ 0 and add up to 1.")
    return targets


def _softmax_curvature(f: Tensor, v: Tensor) -> Tensor:
    p = f.softmax(-1)
    return p * (v - (p * v).sum(-1, keepdim=True))


LOSSES: dict[str, Loss] = {
    "mse": Loss(_values, lambda f, y: f - y, lambda _, v: v),
    "cross_entropy": Loss(
        _probabilities, lambda f, y: torch.softmax(f, -1) - y, _softmax_curvature
    ),
}

"""Residual networks x ← x + V φ(W x): how signals grow in them, how training ends."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ntk_callbacks.engine.signals import signal_statistics
from ntk_callbacks.experiments.initializations import scaled_orthogonal_
from ntk_callbacks.experiments.layers import Linear
from ntk_callbacks.studies.descent import descend
from ntk_callbacks.studies.study import Result
from ntk_callbacks.studies.tasks import digits

_SOON = 10  # updates after which what diverges has mostly done so

PHI: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "tanh": torch.tanh}


class ResidualBlock(nn.Module):
    """x + V φ(W x), with W and V of equal scale.

    Args:
        width: Units n; entries of W and V have variance `scale`/n.
        scale: σ_v σ_w of the branch.
        activation: A name in `PHI`.

    Example:
        >>> ResidualBlock(3, 1.0, "relu")(torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """

    def __init__(self, width: int, scale: float, activation: str) -> None:
        super().__init__()
        self.inner = Linear(width, width, sigma_w=scale**0.5)
        self.outer = Linear(width, width, sigma_w=scale**0.5)
        self.phi = PHI[activation]

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, width) to (n, width)."""
        branch: Tensor = self.outer(self.phi(self.inner(x)))
        return x + branch


def growth(
    *, activation: str, width: int, depth: int, examples: int, device: str
) -> Result:
    """Mean squares of skip connection and gradient, block by block.

    Args:
        activation: A name in `PHI`.
        width: Units.
        depth: Blocks, of scale 1.
        examples: Inputs, each of mean square 1.
        device: Where to compute.

    Returns:
        `signal` and `gradient`, depth + 1 numbers each, the first before any block.
    """
    first = nn.Linear(width, width, bias=False)
    scaled_orthogonal_(first.weight)  # keeps the mean square at 1 exactly
    blocks = [ResidualBlock(width, 1.0, activation) for _ in range(depth)]
    model = nn.Sequential(first, *blocks).to(device)
    x = torch.randn(examples, width, device=device)
    x = nn.functional.normalize(x) * width**0.5
    found = signal_statistics(model, x, layers=lambda name, _: name.isdigit())
    return {
        "signal": found.q.tolist(),
        "gradient": found.gradient_square.tolist(),
    }


def final_loss(
    *,
    width: int,
    depth: int,
    scale: float,
    learning_rate: float,
    examples: int,
    steps: int,
    device: str,
) -> Result:
    """Cross-entropy on digits after full-batch gradient descent.

    Args:
        width: Units of a block.
        depth: Blocks of ReLU.
        scale: σ_v σ_w of every block.
        learning_rate: Of the mean loss.
        examples: Digits, split evenly over the classes.
        steps: Updates.
        device: Where to compute.

    Returns:
        `loss`; None where it is not finite.
    """
    x, labels = digits(examples, device=device, dtype=torch.float32)
    model = nn.Sequential(
        Linear(x.shape[1], width),
        *(ResidualBlock(width, scale, "relu") for _ in range(depth)),
        Linear(width, 10),
    ).to(device)
    loss: float | None = None
    for some in (min(steps, _SOON), max(steps - _SOON, 0)):
        if some and (loss := _descended(model, x, labels, learning_rate, some)) is None:
            break
    return {"loss": loss}


def _descended(
    model: nn.Module, x: Tensor, labels: Tensor, learning_rate: float, steps: int
) -> float | None:
    """The loss after some updates; None where it is not finite."""
    cross_entropy = nn.functional.cross_entropy
    losses = descend(
        model, x, labels, learning_rate=learning_rate, steps=steps, loss=cross_entropy
    )
    return losses[-1] if math.isfinite(losses[-1]) else None


PARTS: dict[str, Callable[..., Result]] = {"growth": growth, "training": final_loss}

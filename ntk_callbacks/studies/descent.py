"""Full-batch training as theory has it: every example, every update, nothing else."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]


def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    """½ Σ (f − y)² over examples and outputs, the loss that kernels are the rate of.

    Args:
        outputs: (n, c).
        targets: (n, c).

    Returns:
        One number.
    """
    return 0.5 * (outputs - targets).square().sum()


def descend(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    learning_rate: float,
    steps: int,
    loss: Loss = half_square,
    momentum: float = 0.0,
) -> list[float]:
    """Gradient descent on all examples at once.

    Args:
        model: Trained in place.
        x: Inputs (n, ...).
        y: Targets.
        learning_rate: η of θ ← θ − η ∇L.
        steps: Updates.
        loss: `(outputs, targets) -> ()`.
        momentum: β of heavy-ball momentum.

    Returns:
        The loss before each update and after the last, `steps + 1` numbers.
    """
    optimizer = torch.optim.SGD(model.parameters(), learning_rate, momentum)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(value.detach()))
    with torch.no_grad():
        losses.append(float(loss(model(x), y)))
    optimizer.zero_grad()
    return losses

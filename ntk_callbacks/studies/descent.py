"""Full-batch training as theory has it: every example, every update, nothing else."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ntk_callbacks.layout import as_matrix

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


def best_heavy_ball(ntk: Tensor) -> tuple[float, float]:
    """The constant learning rate and momentum that converge fastest on a quadratic.

    Args:
        ntk: Kernel on the training set; eigenvalues within round-off of zero, which no
            rate helps, count as round-off.

    Returns:
        η of a loss ½ Σ (f − y)², and β; every eigendirection then shrinks by √β a step.

    Example:
        >>> best_heavy_ball(torch.diag(torch.tensor([9.0, 1.0])))
        (0.25, 0.25)

    References:
        Polyak 1964, "Some methods of speeding up the convergence of iteration methods".
    """
    values = torch.linalg.eigvalsh(as_matrix(ntk) if ntk.ndim > 2 else ntk)
    least = values[-1] * torch.finfo(values.dtype).eps
    low, high = values[0].clamp(min=least).sqrt().item(), values[-1].sqrt().item()
    return (2 / (high + low)) ** 2, ((high - low) / (high + low)) ** 2

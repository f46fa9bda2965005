"""Where the examples lie along the axes of a tensor inside a network."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BatchAxis:
    """The axis that the examples run along, alone or merged with another one.

    Args:
        axis: Its index.
        minor: Whether examples run fastest where the axis also holds something else
            (frames, windows, heads); False if each example's entries are contiguous.
    """

    axis: int
    minor: bool = False

    def first(self, tensor: Tensor, n: int) -> Tensor:
        """A view `(n, k, …)` of a tensor with the examples first.

        Args:
            tensor: Any tensor with this batch axis.
            n: Number of examples.

        Returns:
            k is what the axis holds of each example; the other axes keep their order.

        Raises:
            LookupError: If the axis does not hold n examples.
        """
        if tensor.ndim <= self.axis or tensor.shape[self.axis] % n:
            raise LookupError(
                f"axis {self.axis} of shape {tuple(tensor.shape)} holds no {n} examples"
            )
        sizes = (-1, n) if self.minor else (n, -1)
        split = torch.unflatten(tensor, self.axis, sizes)
        first, second = self.axis + self.minor, self.axis + 1 - self.minor
        return split.movedim((first, second), (0, 1))

    def example(self, tensor: Tensor, n: int, i: int) -> Tensor:
        """What belongs to example i, as a tensor of a batch of one."""
        size = tensor.shape[self.axis]
        if self.minor:
            index = torch.arange(i, size, n, device=tensor.device)
            return tensor.index_select(self.axis, index)
        return tensor.narrow(self.axis, i * (size // n), size // n)


def located(gradients: list[Tensor]) -> BatchAxis | None:
    """The batch axis of a tensor y inside a network.

    Args:
        gradients: The gradient by y of a function of each example alone. Entries that
            belong to another example are exactly zero in it.

    Returns:
        The only axis that fits; None if there is none, or if a gradient is zero.
    """
    n = len(gradients)
    if any(not gradient.any() for gradient in gradients):
        return None
    for axis in range(gradients[0].ndim):
        for minor in (False, True):
            candidate = BatchAxis(axis, minor)
            if all(_owns(candidate, g, n, i) for i, g in enumerate(gradients)):
                return candidate
    return None


def _owns(candidate: BatchAxis, gradient: Tensor, n: int, example: int) -> bool:
    try:
        parts = candidate.first(gradient, n)
    except LookupError:
        return False
    return not any(parts[i].any() for i in range(n) if i != example)

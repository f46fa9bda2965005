"""Where the examples lie along the axes of a tensor inside a network."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count

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
        The first axis that fits; None if there is none, or if a gradient is zero. That
        another one is meant is only possible where few entries are read of an example
        and the axis holds several of each: see `telling_count`.
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


def telling_count(axes: Iterable[tuple[BatchAxis, int]]) -> int:
    """How many examples a, b, a, b, … tell for certain that they lie along some axes.

    An output may read few of the k entries that an axis holds of each example, and its
    gradients fit wrong layouts then: of two examples, the middle ones of three frames
    lie one in either half of the axis. No wrong layout but one puts the entries that
    are read of a in a block of its first and a block of its second copy. It is that of
    examples with faster and slower entries beside them: they look as if they ran
    fastest where the number of faster entries is 1 modulo the number of examples.

    Args:
        axes: Axes that fit, and how many entries of each example they hold.

    Returns:
        2 where each of them holds one, otherwise the least number that leaves no doubt.
    """
    merged = [(axis, k) for axis, k in axes if k > 1]
    if not merged:
        return 2
    faster = {w for axis, k in merged if axis.minor for w in _divisors(k)}
    return next(m for m in count(3) if all(w % m != 1 for w in faster))


def _divisors(k: int) -> list[int]:
    return [w for w in range(2, k + 1) if k % w == 0]


def _owns(candidate: BatchAxis, gradient: Tensor, n: int, example: int) -> bool:
    try:
        parts = candidate.first(gradient, n)
    except LookupError:
        return False
    return not any(parts[i].any() for i in range(n) if i != example)

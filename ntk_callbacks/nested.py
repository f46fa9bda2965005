"""Batches that are tensors, or nested tuples, lists and mappings of tensors.

Every tensor of a batch has the examples along its first axis. Whatever is not a tensor
(a flag, None) belongs to all examples and passes through unchanged. A `PackedSequence`
is no container here: its tensors run over time steps, not examples.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ntk_callbacks._types import Inputs


def leaves(x: Any) -> list[Tensor]:
    """The tensors of a batch, in the order of its structure."""
    return [part for part in parts(x) if isinstance(part, Tensor)]


def parts(x: Any) -> Iterator[Any]:
    """What the containers of a batch hold, tensors or not, in the order of `leaves`."""
    if isinstance(x, Mapping):
        for value in x.values():
            yield from parts(value)
    elif isinstance(x, tuple | list) and not isinstance(x, PackedSequence):
        for value in x:
            yield from parts(value)
    else:
        yield x


def map_tensors(function: Callable[[Tensor], Any], x: Any) -> Any:
    """A batch of the same structure with `function` applied to every tensor."""
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, PackedSequence):
        return x
    if isinstance(x, Mapping):
        return {key: map_tensors(function, value) for key, value in x.items()}
    if isinstance(x, tuple) and hasattr(x, "_fields"):  # a named tuple
        return type(x)(*(map_tensors(function, value) for value in x))
    if isinstance(x, tuple | list):
        return type(x)(map_tensors(function, value) for value in x)
    return x


def replace_leaves(x: Any, tensors: list[Tensor]) -> Any:
    """A batch with the structure of `x` and the given tensors, in order."""
    remaining = iter(tensors)
    return map_tensors(lambda _: next(remaining), x)


def batch_size(x: Inputs) -> int:
    """Number of examples in a batch.

    Args:
        x: The batch.

    Returns:
        The common leading dimension n of its tensors.

    Raises:
        ValueError: If the batch holds no tensor, its tensors disagree about n, or one
            is packed.
    """
    if any(isinstance(part, PackedSequence) for part in parts(x)):
        raise ValueError(
            "a PackedSequence cannot be split into examples; pass the padded tensor "
            "and the lengths as inputs, (padded, lengths), and an `output_fn` that "
            "packs them"
        )
    tensors = leaves(x)
    if not tensors:
        raise ValueError(
            f"a batch must hold at least one tensor, got {type(x).__name__} without "
            "any; tensors are looked for in tuples, lists and mappings"
        )
    sizes = [tensor.shape[0] if tensor.ndim else None for tensor in tensors]
    if sizes[0] is None or any(size != sizes[0] for size in sizes):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise ValueError(
            "every tensor of a batch needs the same leading dimension n, got shapes "
            f"{shapes}"
        )
    return sizes[0]


def examples(x: Inputs, start: int, stop: int) -> Inputs:
    """The examples `start` to `stop` (exclusive) of a batch."""
    part: Inputs = map_tensors(lambda tensor: tensor[start:stop], x)
    return part


def as_targets(targets: Any) -> Tensor | None:
    """The targets of a batch if they are a tensor; what is left out is told.

    Args:
        targets: What stands in their place; None if there are none.

    Returns:
        None for anything that is no tensor.
    """
    if targets is None or isinstance(targets, Tensor):
        return targets
    warnings.warn(
        f"the targets of the batch are a {type(targets).__name__}, not a tensor: they "
        "are left out, and with them whatever needs targets. Build the probe yourself "
        "to have it, Probe(inputs, targets) with one tensor (n, ...) of targets.",
        stacklevel=4,
    )
    return None

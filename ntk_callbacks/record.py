"""Measurement: what one instrument saw at one step."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Measurement:
    """Numbers taken at one step, named by the tags they are logged under.

    Args:
        step: Completed optimizer updates; 0 is the initialization.
        scalars: Tag -> number; non-finite numbers are kept as they are.
        vectors: Tag -> one-dimensional tensor, drawn as a histogram.
        matrices: Tag -> two-dimensional tensor, drawn as a heat map.
    """

    step: int
    scalars: dict[str, float] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)
    matrices: dict[str, Tensor] = field(default_factory=dict)

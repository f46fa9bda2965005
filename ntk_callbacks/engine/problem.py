"""A kernel to compute."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ntk_callbacks._types import Inputs, Scaling
from ntk_callbacks.functional import ModelFunction
from ntk_callbacks.nested import batch_size, map_tensors


@dataclass(frozen=True)
class Problem:
    """A kernel to compute: f, the inputs of both sides, and what is made of J.

    Args:
        function: f(params, x) -> (n, c), differentiated in `function.params`.
        x1: Inputs of the rows.
        x2: Inputs of the columns; None for those of the rows.
        outputs: How the output axes are contracted.
        groups: Parameter name -> the part of the kernel it adds to.
        scaling: Diagonal of Λ for each parameter, or None for the identity.
        budget: Bytes of working memory.
        joint: Whether the examples are known to depend on one another.
    """

    function: ModelFunction
    x1: Inputs
    x2: Inputs | None
    outputs: Literal["full", "trace", "diagonal"]
    groups: dict[str, str]
    scaling: Scaling | None
    budget: int
    joint: bool

    @property
    def sides(self) -> list[Inputs]:
        """The inputs to differentiate: one batch, or two for a cross kernel."""
        return [self.x1] if self.x2 is None else [self.x1, self.x2]

    @property
    def sizes(self) -> tuple[int, int]:
        """Examples of the rows and of the columns."""
        sizes = [batch_size(x) for x in self.sides]
        return sizes[0], sizes[-1]

    def only(self, names: list[str]) -> "Problem":
        """The kernel of some of the parameters."""
        return replace(self, groups={name: self.groups[name] for name in names})

    def at(self, indices: list[int]) -> "Problem":
        """The same kernel on some of the examples of each side."""

        def chosen(x: Inputs) -> Inputs:
            found: Inputs = map_tensors(lambda tensor: tensor[indices], x)
            return found

        x2 = None if self.x2 is None else chosen(self.x2)
        return replace(self, x1=chosen(self.x1), x2=x2)

    def scale(self, name: str) -> Tensor | None:
        """Λ of a parameter in its dtype, 0-dimensional or of its shape."""
        if self.scaling is None:
            return None
        like = self.function.params[name]
        # At once: a float is not a float32.
        return torch.as_tensor(self.scaling[name], dtype=like.dtype, device=like.device)

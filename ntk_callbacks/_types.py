"""Names for the arrays and callables that cross module borders; no code.

Shapes use the letters of the whole package: `n` examples, `c` flattened outputs of one
example, `p` parameters, `d` flattened inputs of one example.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

from jaxtyping import Float
from torch import Tensor, nn

Params: TypeAlias = dict[str, Tensor]
"""Parameter name -> tensor."""

Inputs: TypeAlias = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""One batch: a tensor, or a (nested) tuple or mapping of tensors of leading size n."""

OutputFunction: TypeAlias = Callable[[nn.Module, Any], Tensor]
"""`(model, x) -> (n, ...)`: the quantity whose kernel is measured."""

ParameterFilter: TypeAlias = str | Callable[[str, nn.Parameter], bool] | None
"""A regular expression on names, a predicate `(name, parameter)`, or None."""

Scaling: TypeAlias = Mapping[str, float | Tensor]
"""Parameter name -> diagonal of Λ in the preconditioned kernel J Λ Jᵀ."""

Grouping: TypeAlias = Literal["module", "parameter"] | Mapping[str, str] | None
"""How a kernel is split into parts that add up to the whole."""

Outputs: TypeAlias = Literal["full", "trace", "diagonal", "pseudo"]
Mode: TypeAlias = Literal["eval", "train"]

Kernel: TypeAlias = (
    Float[Tensor, "n1 n2 c c"] | Float[Tensor, "n1 n2 c"] | Float[Tensor, "n1 n2"]
)

"""J·v of one batch by two ways that know nothing of each other.

Forward mode carries a tangent through the forward pass and keeps no graph. Double
backward differentiates Jᵀw, which is linear in w, by w: two to three times the cost and
the memory, for kernels and functions that only know how to run backwards.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad as untyped_forward_ad
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from ntk_callbacks._types import Inputs, Params
from ntk_callbacks.engine.backward import leaf_parameters
from ntk_callbacks.functional import ModelFunction
from ntk_callbacks.nested import leaves

forward_ad: Any = untyped_forward_ad

Way: TypeAlias = Callable[[ModelFunction, Inputs, Iterable[Params]], list[Tensor]]
"""`(function, x, tangents)` -> J·v, `(n, c)`, for each tangent v {name: tensor}."""


def forward_mode(
    function: ModelFunction, x: Inputs, tangents: Iterable[Params]
) -> list[Float[Tensor, "n c"]]:
    """J·v of each tangent by one forward pass with dual numbers.

    Args:
        function: f(params, x), differentiated in `function.params`.
        x: A batch.
        tangents: For each product, a tensor for each of those parameters.

    Returns:
        The derivative of the outputs along each tangent.
    """
    pushed = []
    for tangent in tangents:
        try:
            change = _pushed(function, x, tangent, _bare_dual)
        except NotImplementedError:
            change = _pushed(function, x, tangent, forward_ad.make_dual)
        pushed.append(change.detach())
    return pushed


def _pushed(
    function: ModelFunction, x: Inputs, tangent: Params, make_dual: Callable[..., Any]
) -> Tensor:
    level: Any
    with _composite_kernels(), _forward_warnings(), forward_ad.dual_level() as level:
        dual = {
            name: make_dual(parameter, tangent[name], level=level)
            for name, parameter in function.params.items()
        }
        outputs, change = forward_ad.unpack_dual(function(dual, x))
        return torch.zeros_like(outputs) if change is None else change


def _bare_dual(tensor: Tensor, tangent: Tensor, *, level: int) -> Tensor:
    """`make_dual` without the rules that it compiles first; few models need them."""
    dual: Tensor = torch._VF._make_dual(tensor, tangent, level=level)
    return dual


def double_backward(
    function: ModelFunction, x: Inputs, tangents: Iterable[Params]
) -> list[Float[Tensor, "n c"]]:
    """J·v of each tangent as the derivative of wᵀJ·v by w, from one graph.

    Args:
        function: f(params, x), differentiated in `function.params`.
        x: A batch.
        tangents: For each product, a tensor for each of those parameters.

    Returns:
        The derivative of the outputs along each tangent.
    """
    leaf = leaf_parameters(function)

    def transposed_twice(outputs: Float[Tensor, "n c"]) -> list[Tensor]:
        weight = torch.ones_like(outputs).requires_grad_()
        rows = (
            torch.autograd.grad(
                outputs,
                [leaf[name] for name in function.params],
                weight,
                create_graph=True,
                allow_unused=True,
            )
            if outputs.requires_grad
            else [None] * len(function.params)
        )
        linear = {
            name: row
            for name, row in zip(function.params, rows, strict=True)
            if row is not None and row.requires_grad
        }
        return [_derivative(linear, weight, tangent) for tangent in tangents]

    with _composite_kernels():
        return function.during(leaf, x, transposed_twice)


WAYS: dict[str, Way] = {
    "forward mode": forward_mode,
    "double backward": double_backward,
}
"""Name -> how J·v is computed, the cheapest first."""


class ForwardModeWatch(TorchFunctionMode):
    """Raises where forward mode would silently give what no backward pass gives.

    Forward mode does not stop at `torch.no_grad`, and moves the padding row of an
    embedding. Training goes by the backward pass, so that one is right.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.embedding:
            bound = signature(func).bind(*args, **kwargs).arguments
            if bound.get("padding_idx") is not None or bound.get("scale_grad_by_freq"):
                raise NotImplementedError(
                    "an embedding whose gradient is masked or rescaled"
                )
        result = func(*args, **kwargs)
        if not torch.is_grad_enabled() and any(map(_moves, leaves(result))):
            raise NotImplementedError(
                "a function of the parameters inside torch.no_grad"
            )
        return result


def _moves(tensor: Tensor) -> bool:
    moves: bool = forward_ad.unpack_dual(tensor).tangent is not None
    return moves


def _derivative(linear: Params, weight: Tensor, tangent: Params) -> Tensor:
    (change,) = torch.autograd.grad(
        list(linear.values()),
        weight,
        [tangent[name] for name in linear],
        retain_graph=True,
        materialize_grads=True,
        allow_unused=True,
    )
    return change


@contextmanager
def _composite_kernels() -> Iterator[None]:
    """Attention as products and softmax: the fused kernels only have a backward."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def _forward_warnings() -> Iterator[None]:
    """Without the warnings that forward mode itself causes."""
    with warnings.catch_warnings():
        # The first dual tensor imports parts of torch that torch has deprecated.
        warnings.filterwarnings("ignore", "`torch.jit.script", FutureWarning)
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
        # Reentrant checkpoints, where no parameter is to have a gradient.
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
        yield

"""f(x; θ₀) + J(x; θ₀)(θ − θ₀) on one call of a model, and its gradients.

The value takes one J·v, the gradient by θ one backward pass of the model, which is run
again for it: nothing but the inputs is held in between.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ntk_callbacks._types import OutputFunction, Params
from ntk_callbacks.engine.backward import graph_nodes, leaf_parameters
from ntk_callbacks.engine.coupling import refuse_randomness
from ntk_callbacks.engine.linearization import Linearization
from ntk_callbacks.engine.pushforward import WAYS
from ntk_callbacks.errors import UnsupportedModelError
from ntk_callbacks.functional import ModelFunction
from ntk_callbacks.nested import leaves, map_tensors, replace_leaves
from ntk_callbacks.outputs import call_model


class Expansion:
    """A model around θ₀ on the arguments of one call.

    All outputs of the call count as one example, so that they may have any shape and
    the examples may depend on one another.

    Args:
        model: In the state it is expanded in.
        point: θ₀, for each parameter.
        moved: Names of the parameters that may differ from θ₀.
        evaluate: `(model, inputs)` -> one tensor.
        inputs: What `evaluate` takes beside the model; a structure of tensors.

    Attributes:
        names: Of the parameters that may differ, in the order of the model.
        sources: The tensors among the inputs that require a gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        point: Params,
        moved: set[str],
        evaluate: Callable[[nn.Module, Any], Tensor],
        inputs: Any,
    ) -> None:
        self._model, self._evaluate = model, evaluate
        self._function = ModelFunction(
            model, output_fn=self._flat, parameters=lambda name, _: name in moved
        )
        for held in (self._function.params, self._function.fixed):
            for name, tensor in held.items():
                held[name] = point[name].detach().to(tensor)
        self.names = list(self._function.params)
        self._structure = map_tensors(lambda _: _PLACE, inputs)
        given = leaves(inputs)
        self.sources = [tensor for tensor in given if tensor.requires_grad]
        self._is_source = [tensor.requires_grad for tensor in given]
        self._inputs = [tensor.detach() for tensor in given]
        self._one = torch.empty(1, 0, device=self._function.device)
        self._seen: Tensor | None = None

    def _flat(self, model: nn.Module, _: Any) -> Tensor:
        # In full precision, and a copy: a model may overwrite what it is given.
        tensors = [_in_full_precision(tensor).clone() for tensor in self._inputs]
        self._seen = self._evaluate(model, replace_leaves(self._structure, tensors))
        return self._seen.reshape(1, -1)

    def agreeing_way(self) -> str:
        """Name of the first way of computing J·v that fits the backward pass.

        Returns:
            A key of `WAYS`.

        Raises:
            UnsupportedModelError: If the model is random, uses parameters that are none
                of its attributes, or no way is right.
        """
        function, x = self._function, self._one
        refuse_randomness(function, x)
        count = function.during(leaf_parameters(function), x, _outputs_of_own)
        way, _ = Linearization(function, x, 1, count, 1, joint=True).agreeing_way()
        return next(name for name, known in WAYS.items() if known is way)

    def value(self, theta: Sequence[Tensor], way: str) -> Tensor:
        """f(x; θ₀) + J·(θ − θ₀), without a graph.

        Args:
            theta: The parameters in the order of `names`.
            way: How J·v is computed, a key of `WAYS`.

        Returns:
            A tensor of the shape of the model's output.
        """
        change = self._change([tensor.detach() for tensor in theta])
        tangent = dict(zip(self.names, change, strict=True))
        (along,) = WAYS[way](self._function, self._one, [tangent])
        assert self._seen is not None
        here, self._seen = self._seen.detach(), None
        return here + along.view_as(here)

    def gradients(
        self, weight: Tensor, theta: Sequence[Tensor], sources: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Jᵀu, and the gradients of uᵀ(f + J(θ − θ₀)) by inputs.

        Those by inputs come from a backward pass through the first one, not from J·v:
        that would take derivatives of third order, which torch does not have of some
        layers and gets wrong of layer normalization.

        Args:
            weight: u, of the shape of the output.
            theta: The parameters in the order of `names`.
            sources: Those of the attribute to differentiate by, or nothing.

        Returns:
            One tensor for each of `names`, then one for each source; None where there
            is no path. With a graph if gradients are enabled.
        """
        recorded = torch.is_grad_enabled()
        if not recorded:
            theta = [tensor.detach() for tensor in theta]
            sources = [tensor.detach().requires_grad_() for tensor in sources]
        function, leaf = self._function, leaf_parameters(self._function)
        wanted = [leaf[name] for name in self.names]

        def pulled(outputs: Tensor) -> list[Tensor | None]:
            total = (outputs * weight.reshape(1, -1)).sum()
            rows = _gradients(total, wanted, recorded or bool(sources))
            if not sources:
                return rows
            for row, change in zip(rows, self._change(theta), strict=True):
                if row is not None:
                    total = total + (row * change).sum()
            return rows + _gradients(total, sources, recorded)

        given = self._inputs
        if sources:
            waiting = iter(sources)
            self._inputs = [
                next(waiting) if source else tensor
                for tensor, source in zip(given, self._is_source, strict=True)
            ]
        with ExitStack() as stack:
            stack.enter_context(full_precision(self._model))
            if recorded or sources:
                # The fused kernels of attention can be differentiated only once.
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            found = function.during(leaf, self._one, pulled)
        self._inputs, self._seen = given, None
        return found

    def _change(self, theta: Sequence[Tensor]) -> list[Tensor]:
        """θ − θ₀; of half-precision numbers in full precision, to keep the digits."""
        pairs = zip(theta, self._function.params.values(), strict=True)
        return [tensor.to(at) - at for tensor, at in pairs]


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Gradients on, autocast off, and only kernels that can be differentiated twice.

    Args:
        model: The model that is about to be run.

    Yields:
        Nothing.
    """
    cudnn: Any = torch.backends.cudnn
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for kind in {"cpu"} | {tensor.device.type for tensor in model.parameters()}:
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            # cuDNN has no forward mode, and a backward pass in training mode only.
            stack.callback(setattr, cudnn, "enabled", cudnn.enabled)
            cudnn.enabled = False
        yield


def model_output(
    model: nn.Module,
    output_fn: OutputFunction | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """What a call of the model gives, as one tensor.

    Args:
        model: Any module.
        output_fn: `(model, x) -> tensor`; None for `model(*args, **kwargs)`.
        args: Positional arguments.
        kwargs: Keyword arguments.

    Returns:
        A tensor of any shape.
    """
    if kwargs and args:
        bound = inspect.signature(model.forward).bind_partial(*args).arguments
        args, kwargs = (), {**bound, **kwargs}
    if output_fn is None:
        return call_model(model, kwargs or args)
    return output_fn(model, kwargs or (args[0] if len(args) == 1 else args))


_PLACE = torch.empty(0)  # of a tensor in a structure


def _outputs_of_own(outputs: Tensor) -> int:
    """How many outputs there are, of a model that uses its own parameters only."""
    for node in graph_nodes(outputs):
        if isinstance(getattr(node, "variable", None), nn.Parameter):
            raise UnsupportedModelError(
                "linearize: the model reaches a parameter past its attributes (through "
                "a list, a closure, a partial), where a copy of the model still uses "
                "that of the original. Use an attribute in `forward`."
            )
    return outputs.numel()


def _in_full_precision(tensor: Tensor) -> Tensor:
    half = tensor.is_floating_point() and tensor.dtype.itemsize < 4
    return tensor.float() if half else tensor


def _gradients(
    number: Tensor, inputs: Sequence[Tensor], recorded: bool
) -> list[Tensor | None]:
    if not number.requires_grad:
        return [None] * len(inputs)
    return list(
        torch.autograd.grad(
            number, list(inputs), create_graph=recorded, allow_unused=True
        )
    )

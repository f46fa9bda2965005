"""One forward pass, and the places in it that Jacobians lead from and to."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeVar, get_args

from torch import Tensor, nn

from ntk_callbacks._types import Inputs, Mode, OutputFunction, Params
from ntk_callbacks.engine.arguments import check_choice
from ntk_callbacks.engine.backward import has_reentrant_checkpoint
from ntk_callbacks.engine.coupling import is_coupled
from ntk_callbacks.engine.layer_calls import batch_axes, watched
from ntk_callbacks.engine.segments import Place
from ntk_callbacks.errors import UnsupportedModelError
from ntk_callbacks.functional import ModelFunction
from ntk_callbacks.guard import measuring
from ntk_callbacks.nested import batch_size, examples, leaves, replace_leaves

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Trace:
    """The places of one forward pass.

    Args:
        inputs: The floating inputs; None if there are none.
        layers: Name of each call of a chosen layer -> its output h, in order.
        outputs: What is measured.
        examples: How many examples have Jacobians: the first ones of the batch.
        joint: Whether examples depend on one another.
    """

    inputs: Place | None
    layers: dict[str, Place]
    outputs: Place
    examples: int
    joint: bool

    def floating_inputs(self) -> Place:
        """The inputs.

        Returns:
            Their place.

        Raises:
            UnsupportedModelError: If all of them are integers.
        """
        if self.inputs is None:
            raise UnsupportedModelError(
                "the inputs are integers: there is no derivative by them. Start from "
                "the layer that embeds them."
            )
        return self.inputs


@dataclass(frozen=True)
class Subject:
    """A model and a batch, ready to be run.

    Args:
        function: The model.
        x: The batch.
        examples: How many examples have Jacobians: the first ones.
        joint: Whether examples depend on one another.
    """

    function: ModelFunction
    x: Inputs
    examples: int
    joint: bool

    def __iter__(self) -> "Iterator[Subject]":
        """The examples one by one; those of a joint batch cannot be parted."""
        for i in range(self.examples):
            yield Subject(self.function, examples(self.x, i, i + 1), 1, False)


@contextmanager
def opened(
    model: nn.Module,
    x: Inputs,
    output_fn: OutputFunction | None,
    mode: Mode,
    count: int | None,
) -> Iterator[Subject]:
    """A model while it is measured; nothing of it is left behind.

    Args:
        model: Left exactly as it was.
        x: All examples; more than `count` matter only if they depend on one another.
        output_fn: `(model, x) -> (n, ...)`; default `model(x)`.
        mode: `"eval"` or `"train"`.
        count: How many examples are to have Jacobians; None for all.

    Yields:
        What can be run until the context ends.

    Raises:
        ValueError: If there is no example, or an argument is not understood.
    """
    check_choice("mode", mode, get_args(Mode))
    if count is not None and count < 1:
        raise ValueError(f"count={count}; expected 1 or more examples.")
    with measuring(model, mode):
        function = ModelFunction(model, output_fn=output_fn, parameters=_every)
        x = function.prepare(x)
        n = batch_size(x)
        if n == 0:
            raise ValueError("the inputs hold no example.")
        count = n if count is None else min(count, n)
        joint = is_coupled(function, x, count, joint=mode == "train")
        yield Subject(function, x if joint else examples(x, 0, count), count, joint)


def run(
    subject: Subject,
    watching: AbstractContextManager[object],
    then: Callable[[Place | None, Place], _Result],
) -> _Result:
    """One forward pass with a graph, and what `then` makes of it.

    Args:
        subject: What is run.
        watching: Open during the forward pass alone: checkpoints call layers again on
            the way back.
        then: Takes the places of the floating inputs (None if there are none) and of
            the outputs, whose graph is there until it returns.

    Returns:
        What `then` returns.

    Raises:
        UnsupportedModelError: If a reentrant checkpoint hides gradients.
    """
    n = batch_size(subject.x)
    fresh = [
        tensor.detach().clone().requires_grad_(tensor.is_floating_point())
        for tensor in leaves(subject.x)
    ]
    sources = [leaf for leaf in fresh if leaf.requires_grad]
    with ExitStack() as open_:
        open_.enter_context(watching)

        def finish(outputs: Tensor) -> _Result:
            open_.close()
            _refuse_hidden(outputs)
            inputs = Place.of(sources, [0] * len(sources), n) if sources else None
            return then(inputs, Place.of([outputs], [0], n))

        x = replace_leaves(subject.x, fresh)
        return subject.function.during(_leaves(subject.function), x, finish)


def traced(
    model: nn.Module,
    x: Inputs,
    choose: Callable[[], dict[str, nn.Module]],
    then: Callable[[Trace], _Result],
    *,
    output_fn: OutputFunction | None = None,
    mode: Mode = "eval",
    count: int | None = None,
) -> list[_Result]:
    """What `then` makes of the graph of a forward pass.

    Args:
        model: Left exactly as it was.
        x: All examples; more than `count` matter only if they depend on one another.
        choose: Gives name -> layer, whose outputs become places. Called once the model
            is guarded: parametrizations that are looked at may compute, draw or count.
        then: Takes a trace, whose graph is there until it returns.
        output_fn: `(model, x) -> (n, ...)`; default `model(x)`.
        mode: `"eval"` or `"train"`.
        count: How many examples are to have Jacobians; None for all.

    Returns:
        One result for the batch; or one for each example, where the output of a layer
        holds examples and something else along one axis (windows, heads).

    Raises:
        ValueError: If there is no example, or an argument is not understood.
        UnsupportedModelError: If the outputs are random, a reentrant checkpoint hides
            gradients, or examples depend on one another where they lie unknown.
    """
    with opened(model, x, output_fn, mode, count) as subject:
        chosen = choose()
        trace = _trace(subject, chosen, then)
        if not isinstance(trace, _Unplaced):
            return [trace]
        if subject.joint:
            raise UnsupportedModelError(
                f"layer {trace.layer!r} holds examples and something else along one "
                "axis, and examples depend on one another, so that they cannot be run "
                "one by one. Choose other layers."
            )
        alone = [_trace(one, chosen, then) for one in subject]
        return [found for found in alone if not isinstance(found, _Unplaced)]


@dataclass(frozen=True)
class _Unplaced:
    """A layer whose output does not say where the examples lie."""

    layer: str


def _trace(
    subject: Subject, chosen: dict[str, nn.Module], then: Callable[[Trace], _Result]
) -> "_Result | _Unplaced":
    n = batch_size(subject.x)
    # A single example owns everything.
    axis = batch_axes(subject.function, subject.x, chosen) if n > 1 else None
    layers: dict[str, Place] = {}
    lost: list[str] = []

    def seen(name: str, _module: nn.Module, _given: list[Tensor], h: Tensor) -> None:
        # Now, because an activation may work in place.
        at = None if axis is None else axis(name, h.shape)
        if axis is not None and at is None:
            lost.append(name)
        layers[name] = Place.of([h], [at], n)

    def finish(inputs: Place | None, outputs: Place) -> "_Result | _Unplaced":
        if lost:
            return _Unplaced(lost[0])
        return then(Trace(inputs, layers, outputs, subject.examples, subject.joint))

    return run(subject, watched(chosen, seen), finish)


def _every(_name: str, _parameter: nn.Parameter) -> bool:
    return True


def _leaves(function: ModelFunction) -> Params:
    """All parameters with gradients: behind integer inputs they start the graph."""
    return {
        name: tensor.detach().requires_grad_(tensor.is_floating_point())
        for name, tensor in (function.params | function.fixed).items()
    }


def _refuse_hidden(outputs: Tensor) -> None:
    if has_reentrant_checkpoint(outputs):
        raise UnsupportedModelError(
            "a reentrant checkpoint hides the gradients inside it. Call "
            "checkpoint(..., use_reentrant=False)."
        )

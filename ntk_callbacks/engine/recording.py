"""A forward pass that is cut at its taps, and backward passes to them."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from ntk_callbacks._types import Inputs, Params
from ntk_callbacks.engine.backward import graph_nodes, refuse_bypassed
from ntk_callbacks.engine.recurrence import UNROLLED
from ntk_callbacks.engine.rules import RULES
from ntk_callbacks.engine.taps import Recorder, Tap
from ntk_callbacks.functional import ModelFunction
from ntk_callbacks.nested import map_tensors


@dataclass(frozen=True)
class Recording:
    """One forward pass.

    Args:
        parameters: The leaves.
        outputs: `(n, c)`.
        taps: In their order.
        native: Whether torch alone takes part in backward passes: no function or hook
            of a user, which may do anything with gradients.
        largest: Numbers of the largest tensor.
    """

    parameters: Params
    outputs: Tensor
    taps: list[Tap]
    native: bool
    largest: int


def record(
    function: ModelFunction, params: Params, x: Inputs, names: list[str]
) -> Recording:
    """Run the model, and note where the named parameters meet the data.

    Args:
        function: The model.
        params: Values of its parameters.
        x: A batch.
        names: The parameters to differentiate.

    Returns:
        The outputs, whose graph ends at the taps.
    """
    leaves = {name: params[name].detach().requires_grad_() for name in names}

    def from_data(tensor: Tensor) -> Tensor:
        differentiable = tensor.is_floating_point()
        return tensor.detach().requires_grad_() if differentiable else tensor

    inputs = map_tensors(from_data, x)
    recorder = Recorder(leaves, inputs, RULES, UNROLLED)
    with recorder:
        outputs = function(params | leaves, inputs)
    refuse_bypassed(function, outputs)
    native = not recorder.hooked and not any(
        isinstance(node, BackwardCFunction) for node in graph_nodes(outputs)
    )
    return Recording(leaves, outputs, recorder.taps, native, recorder.largest)


def gradients_at(
    taps: list[Tap], number: Tensor, directions: Tensor | None = None
) -> list[Tensor]:
    """The gradients of a number by the outputs of taps, zero where there is no path.

    Args:
        taps: Where to stop; their graph is kept.
        number: What to differentiate, or a vector of numbers.
        directions: For a vector, the rows of the result in terms of its entries; all
            of them are differentiated in one backward pass.

    Returns:
        For each tap a tensor of its shape, behind an axis for the directions if given.
    """
    lead = () if directions is None else (len(directions),)
    found = torch.autograd.grad(
        number,
        [tap.edge for tap in taps],
        directions,
        retain_graph=True,
        allow_unused=True,
        is_grads_batched=directions is not None,
    )
    return [
        number.new_zeros(*lead, *tap.shape) if gradient is None else gradient
        for tap, gradient in zip(taps, found, strict=True)
    ]

"""Backward passes and what they need; reentrant checkpoints included."""

from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ntk_callbacks._types import Inputs, Params
from ntk_callbacks.errors import UnsupportedModelError
from ntk_callbacks.functional import ModelFunction
from ntk_callbacks.nested import batch_size, leaves

Gradients: TypeAlias = Callable[[Tensor, list[Tensor]], list[Tensor]]
"""`(number, leaves)` -> its derivative by each leaf, zero where there is no path."""


def gradients_of(outputs: Tensor) -> Gradients:
    """How to differentiate single numbers of `outputs`, whose graph is kept.

    Args:
        outputs: What the forward pass gave.

    Returns:
        A function of one number and the leaves to differentiate it by.
    """
    return _by_backward if has_reentrant_checkpoint(outputs) else _by_grad


def has_reentrant_checkpoint(outputs: Tensor) -> bool:
    """Whether gradients are hidden in a checkpoint that runs autograd inside autograd.

    `autograd.grad` raises on its way through one, and gives zeros for the parameters
    inside if nothing before it is differentiated.

    Args:
        outputs: What the forward pass gave.

    Returns:
        Whether there is one in its graph.
    """
    return any("CheckpointFunction" in node.name() for node in graph_nodes(outputs))


def graph_nodes(outputs: Tensor) -> Iterator[Node]:
    """Every node of the graph behind `outputs`, each once."""
    waiting, seen = [outputs.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(parent for parent, _ in node.next_functions)
            yield node


def refuse_bypassed(function: ModelFunction, outputs: Tensor) -> None:
    """Raise if the model reaches a measured parameter past its attribute.

    Args:
        function: The model.
        outputs: What its forward pass gave.

    Raises:
        UnsupportedModelError: If a parameter of the model itself is in the graph.
    """
    for node in graph_nodes(outputs):
        name = function.originals.get(id(getattr(node, "variable", None)))
        if name in function.params:
            raise UnsupportedModelError(
                f"the model reaches parameter {name!r} past its attribute of that name "
                "(through a list, a closure, a partial), where its gradient would be "
                "missed. Use the attribute in `forward`."
            )


def _by_grad(number: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    if not number.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    row = torch.autograd.grad(
        number, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return [gradient.to_dense() for gradient in row]  # sparse of some embeddings


def _by_backward(number: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    for leaf in leaves:
        leaf.grad = None
    torch.autograd.backward(number, retain_graph=True)
    return [
        torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.to_dense()
        for leaf in leaves
    ]


def leaf_parameters(function: ModelFunction) -> Params:
    """All parameters; those need a gradient that do in training, or are measured."""
    # Also those that are not measured: a reentrant checkpoint differentiates nothing
    # unless one of its inputs needs a gradient.
    return {
        name: tensor.detach().requires_grad_(
            name in function.params or name in function.trained
        )
        for name, tensor in (function.params | function.fixed).items()
    }


def graph_size(function: ModelFunction, x: Inputs) -> tuple[int, int]:
    """Outputs of one example, and bytes its graph keeps for the backward pass.

    Args:
        function: The model.
        x: A batch.

    Returns:
        c, and the bytes of one example.
    """
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would hold its own graph for ever

    n = batch_size(x)
    leaf = leaf_parameters(function)
    known = {tensor.untyped_storage().data_ptr() for tensor in leaf.values()}
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = function(leaf, x)
    except RuntimeError:  # an `output_fn` that calls `torch.func` itself: a guess
        outputs = function(leaf, x)
        seen = [*leaves(x), outputs]
        kept = {i: 32 * t.numel() * t.element_size() for i, t in enumerate(seen)}
    refuse_bypassed(function, outputs)
    saved = sum(size for pointer, size in kept.items() if pointer not in known)
    return outputs.shape[1], -(-saved // n)

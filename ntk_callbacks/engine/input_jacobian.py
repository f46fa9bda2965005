"""The input-output Jacobian ∂f/∂x of each example, and its singular values."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ntk_callbacks._types import Inputs, Mode, OutputFunction
from ntk_callbacks.engine.backward import gradients_of, has_reentrant_checkpoint
from ntk_callbacks.engine.coupling import forward, is_coupled
from ntk_callbacks.engine.memory import memory_bytes
from ntk_callbacks.engine.segment_jacobians import jacobians
from ntk_callbacks.engine.segments import Place
from ntk_callbacks.engine.spectral import singular_values
from ntk_callbacks.errors import MemoryBudgetError, UnsupportedModelError
from ntk_callbacks.functional import ModelFunction
from ntk_callbacks.guard import measuring
from ntk_callbacks.nested import batch_size, examples, leaves, replace_leaves


def input_jacobian(
    model: nn.Module,
    x: Inputs,
    *,
    output_fn: OutputFunction | None = None,
    mode: Mode = "eval",
    memory_budget: int | str | None = None,
) -> Float[Tensor, "n c d"]:
    """Input-output Jacobian ∂f(x_i)/∂x_i of every example.

    Inputs of any shape are flattened into d; of several input tensors the floating ones
    are taken, one after the other. Integers (tokens, indices) are held fixed. If the
    examples depend on one another, this is the block of an example with itself.

    Args:
        model: Any module; left exactly as it was.
        x: n inputs: a tensor, or a nested tuple or mapping of tensors.
        output_fn: `(model, x) -> (n, ...)`; default `model(x)`.
        mode: `"eval"` or `"train"`, as in `empirical_ntk`.
        memory_budget: Bytes of the result at most; default a quarter of what is free.

    Returns:
        Tensor `(n, c, d)` in the dtype and on the device of the parameters.

    Raises:
        ValueError: If there is no example.
        UnsupportedModelError: If no input is floating, or the outputs are random.
        MemoryBudgetError: If the result does not fit; see `input_singular_values`.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> _ = net.weight.data.copy_(torch.tensor([[2.0, 3.0]]))
        >>> input_jacobian(net, torch.zeros(1, 2))
        tensor([[[2., 3.]]])
    """
    with measuring(model, mode):
        blocks = _jacobian_blocks(model, x, output_fn, mode, memory_budget, None)
        return torch.cat(list(blocks))


def input_singular_values(
    model: nn.Module,
    x: Inputs,
    *,
    output_fn: OutputFunction | None = None,
    mode: Mode = "eval",
    memory_budget: int | str | None = None,
) -> Float[Tensor, "n r"]:
    """Singular values of the input-output Jacobian of every example.

    The network is an isometry where all of them are 1 (dynamical isometry).

    Args:
        model: Any module; left exactly as it was.
        x: n inputs, as in `input_jacobian`.
        output_fn: `(model, x) -> (n, ...)`; default `model(x)`.
        mode: `"eval"` or `"train"`, as in `empirical_ntk`.
        memory_budget: Bytes that the Jacobians held at a time may take.

    Returns:
        Values ≥ 0 in float64, the largest first, r = min(c, d); NaN where the
        Jacobian is not finite.

    Raises:
        ValueError: If there is no example.
        UnsupportedModelError: If no input is floating, or the outputs are random.
        MemoryBudgetError: If the Jacobian of one example does not fit.

    Example:
        >>> net = nn.Linear(2, 2, bias=False)
        >>> _ = net.weight.data.copy_(torch.diag(torch.tensor([0.5, 2.0])))
        >>> input_singular_values(net, torch.zeros(1, 2))
        tensor([[2.0000, 0.5000]], dtype=torch.float64)

    References:
        Pennington, Schoenholz, Ganguli 2017, arXiv:1711.04735.
    """
    with measuring(model, mode):
        blocks = _jacobian_blocks(model, x, output_fn, mode, memory_budget, 4)
        return torch.cat([singular_values(block) for block in blocks])


def input_jacobian_shape(
    model: nn.Module,
    x: Inputs,
    *,
    output_fn: OutputFunction | None = None,
    mode: Mode = "eval",
) -> tuple[int, int]:
    """Sizes c and d of the Jacobian ∂f/∂x of one example, by one forward pass.

    Args:
        model: Any module; left exactly as it was.
        x: n inputs, as in `input_jacobian`.
        output_fn: `(model, x) -> (n, ...)`; default `model(x)`.
        mode: `"eval"` or `"train"`.

    Returns:
        Numbers of outputs and of floating inputs.

    Raises:
        ValueError: If there is no example.
        UnsupportedModelError: If no input is floating.
    """
    with measuring(model, mode):
        function = ModelFunction(
            model, output_fn=output_fn, parameters=_every_parameter
        )
        x = function.prepare(x)
        if batch_size(x) == 0:
            raise ValueError("input_jacobian: the inputs hold no example.")
        d = sum(tensor[0].numel() for tensor in _floating(x))
        return forward(function, x).shape[1], d


def _jacobian_blocks(
    model: nn.Module,
    x: Inputs,
    output_fn: OutputFunction | None,
    mode: Mode,
    memory_budget: int | str | None,
    copies: int | None,
) -> Iterator[Float[Tensor, "m c d"]]:
    """Jacobians of consecutive examples, as many at a time as the budget allows."""
    # `copies`: how often a block is held while it is used; None if all are kept.
    # Parameters are held fixed here, frozen ones included.
    function = ModelFunction(model, output_fn=output_fn, parameters=_every_parameter)
    x = function.prepare(x)
    if batch_size(x) == 0:
        raise ValueError("input_jacobian: the inputs hold no example.")
    joint = is_coupled(function, x, joint=mode == "train")
    n, sources = batch_size(x), _floating(x)
    c = forward(function, x).shape[1]
    one = c * sum(t[0].numel() for t in sources) * function.dtype.itemsize
    budget = memory_bytes(memory_budget, function.device)
    held = n if copies is None else copies
    if held * one > budget:
        raise MemoryBudgetError(
            f"the input-output Jacobian of {n} examples with {c} outputs takes "
            f"{held * one / 2**20:.3g} MiB, the budget is {budget / 2**20:.3g} MiB. "
            "Raise `memory_budget` or measure fewer examples or outputs."
        )
    size = n if copies is None else min(n, budget // (copies * one))
    for start in range(0, n, size):
        stop = min(start + size, n)
        if joint:
            yield _joint_block(function, x, start, stop)
        else:
            yield _independent_block(function, examples(x, start, stop))


def _every_parameter(_name: str, _parameter: nn.Parameter) -> bool:
    return True


def _floating(x: Inputs) -> list[Tensor]:
    sources = [tensor for tensor in leaves(x) if tensor.is_floating_point()]
    if not sources:
        kinds = ", ".join(str(tensor.dtype) for tensor in leaves(x))
        raise UnsupportedModelError(
            f"the inputs are {kinds}: there is no derivative by integers. Measure from "
            "the embeddings on: pass them as the inputs and an `output_fn` that starts "
            "there."
        )
    return sources


def _differentiable(x: Inputs) -> tuple[Inputs, list[Tensor]]:
    """The batch with fresh leaves for its floating tensors, and those leaves."""
    fresh = [
        tensor.detach().clone().requires_grad_(tensor.is_floating_point())
        for tensor in leaves(x)
    ]
    return replace_leaves(x, fresh), [leaf for leaf in fresh if leaf.requires_grad]


def _independent_block(function: ModelFunction, x: Inputs) -> Float[Tensor, "m c d"]:
    """A backward pass for several outputs: Σᵢ f_k(xᵢ) has the rows of all examples."""
    x, sources = _differentiable(x)

    def rows(outputs: Float[Tensor, "m c"]) -> Tensor:
        if outputs.requires_grad and not has_reentrant_checkpoint(outputs):
            m = len(outputs)
            pair = Place.of(sources, [0] * len(sources), m), Place.of([outputs], [0], m)
            return next(jacobians([pair], m, joint=False))
        gradients = gradients_of(outputs)
        return torch.stack(
            [_flat(gradients(column.sum(), sources)) for column in outputs.unbind(1)],
            1,
        )

    return function.during({}, x, rows)


def _joint_block(
    function: ModelFunction, x: Inputs, start: int, stop: int
) -> Float[Tensor, "m c d"]:
    """One backward pass for each row, of which the example's own block is kept."""
    x, sources = _differentiable(x)

    def rows(outputs: Float[Tensor, "n c"]) -> Tensor:
        gradients = gradients_of(outputs)
        return torch.stack(
            [
                torch.stack(
                    [_flat(gradients(value, sources))[i] for value in outputs[i]]
                )
                for i in range(start, stop)
            ]
        )

    return function.during({}, x, rows)


def _flat(gradients: list[Tensor]) -> Float[Tensor, "m d"]:
    return torch.cat([gradient.flatten(1) for gradient in gradients], 1)

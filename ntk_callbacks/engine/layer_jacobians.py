"""Jacobians between layers: ∂(output of one)/∂(output of another), by depth."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ntk_callbacks._types import Inputs, Mode, OutputFunction
from ntk_callbacks.engine.layer_calls import (
    LayerFilter,
    check_layers,
    chosen_layers,
    nothing_to_see,
)
from ntk_callbacks.engine.memory import memory_bytes
from ntk_callbacks.engine.segment_jacobians import jacobians
from ntk_callbacks.engine.segment_spectra import SegmentSpectra, segment_spectra
from ntk_callbacks.engine.traces import Trace, traced
from ntk_callbacks.errors import MemoryBudgetError, UnsupportedModelError


@dataclass(frozen=True)
class DepthSpectra:
    """Singular values of the Jacobians of a network, by depth.

    Args:
        names: The layers, in the order in which they are called, L of them.
        step: Of ∂h_{l+1}/∂h_l, L − 1 of them.
        from_input: Of ∂h_l/∂x, L of them; None if no input is floating.
        to_output: Of ∂f/∂h_l, L of them.
    """

    names: tuple[str, ...]
    step: SegmentSpectra
    from_input: SegmentSpectra | None
    to_output: SegmentSpectra


def layer_jacobian(
    model: nn.Module,
    x: Inputs,
    start: str | None = None,
    end: str | None = None,
    *,
    output_fn: OutputFunction | None = None,
    mode: Mode = "eval",
    memory_budget: int | str | None = None,
) -> Float[Tensor, "n c d"]:
    """∂h_end/∂h_start of every example, between the outputs of two layers.

    The derivative is total: where a network has branches, along every path that leads
    through the output of `start`. If examples depend on one another, this is the block
    of an example with itself.

    Args:
        model: Any module; left exactly as it was.
        x: n inputs: a tensor, or a nested tuple or mapping of tensors.
        start: Name of a module, as in `named_modules`; None for the floating inputs.
            Its second call is `<name>.call2`.
        end: The same; None for the outputs of the model.
        output_fn: `(model, x) -> (n, ...)`; default `model(x)`.
        mode: `"eval"` or `"train"`, as in `empirical_ntk`.
        memory_budget: Bytes of the result at most; default a quarter of what is free.

    Returns:
        Tensor `(n, c, d)`, outputs of both layers flattened; NaN if one of them has no
        graph (`torch.no_grad`), 0 where no path leads from one to the other.

    Raises:
        ValueError: If there is no example, or a layer is not known or not called.
        UnsupportedModelError: If there is no floating input to start from, a layer
            returns several tensors, or the outputs are random.
        MemoryBudgetError: If the result does not fit.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> _ = net[2].weight.data.copy_(torch.tensor([[2.0, 3.0]]))
        >>> _ = net[0].weight.data.fill_(1.0)
        >>> layer_jacobian(net, torch.ones(1, 2), start="0")
        tensor([[[2., 3.]]])

    References:
        Pennington, Schoenholz, Ganguli 2017, arXiv:1711.04735.
    """
    named = dict(model.named_modules())
    calls = [name for name in (start, end) if name is not None]
    chosen = {_module_of(call, named) for call in calls}

    def block(trace: Trace) -> Float[Tensor, "n c d"]:
        for call in calls:
            if call not in trace.layers:
                known = ", ".join(map(repr, trace.layers)) or "none"
                raise ValueError(
                    f"layer_jacobian: {call!r} is not called; calls seen: {known}."
                )
        first = trace.floating_inputs() if start is None else trace.layers[start]
        last = trace.outputs if end is None else trace.layers[end]
        size = trace.examples * last.size * first.size * first.like.element_size()
        budget = memory_bytes(memory_budget, first.like.device)
        if size > budget:
            raise MemoryBudgetError(
                f"layer_jacobian: {trace.examples} Jacobians of {last.size} × "
                f"{first.size} numbers take {size / 2**20:.3g} MiB, the budget is "
                f"{budget / 2**20:.3g} MiB. Raise `memory_budget`, take fewer "
                "examples, or ask `jacobian_by_depth` for singular values only."
            )
        (found,) = jacobians([(first, last)], trace.examples, trace.joint)
        return found

    layers = {name: part for name, part in named.items() if name in chosen}
    settings: dict[str, Any] = {"output_fn": output_fn, "mode": mode}
    return torch.cat(traced(model, x, lambda: layers, block, **settings))


def jacobian_by_depth(
    model: nn.Module,
    x: Inputs,
    *,
    layers: LayerFilter = None,
    output_fn: OutputFunction | None = None,
    mode: Mode = "eval",
    count: int | None = None,
) -> DepthSpectra:
    """Singular values of the Jacobians from layer to layer, from x and to f.

    With h_l the outputs of the layers (the pre-activations of linear and convolutional
    ones): ∂h_{l+1}/∂h_l, ∂h_l/∂x and ∂f/∂h_l. ⟨s²⟩ of the first is χ where widths are
    equal. `SegmentSpectra` says which are exact.

    Args:
        model: Any module; left exactly as it was.
        x: n inputs: a tensor, or a nested tuple or mapping of tensors.
        layers: None for linear and convolutional layers; a regular expression, searched
            in the names of these; types, or a predicate `(name, module)`, which alone
            decide.
        output_fn: `(model, x) -> (n, ...)`; default `model(x)`.
        mode: `"eval"` or `"train"`, as in `empirical_ntk`.
        count: Of how many examples, the first ones, Jacobians are taken; None for all.

    Returns:
        `DepthSpectra(names, step, from_input, to_output)`; the extremes of ∂h_l/∂x are
        NaN where it is too wide to be formed: its products go through all l layers.

    Raises:
        ValueError: If there is no example, or an argument is not understood.
        UnsupportedModelError: If no chosen layer is called, one returns several
            tensors, the outputs are random, or a reentrant checkpoint hides gradients.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> _ = net[1].weight.data.copy_(torch.diag(torch.tensor([3.0, 1.0])))
        >>> found = jacobian_by_depth(net, torch.randn(1, 2))
        >>> found.names, found.step.largest, found.step.mean_square
        (('0', '1'), tensor([[3.]], dtype=torch.float64), \
tensor([[5.]], dtype=torch.float64))

    References:
        Pennington, Schoenholz, Ganguli 2017, arXiv:1711.04735; Xiao et al. 2018,
        arXiv:1806.05393 (convolutions).
    """
    check_layers(layers)

    def spectra(trace: Trace) -> DepthSpectra:
        places = list(trace.layers.values())
        if not places:
            why = nothing_to_see(model, layers, "calls no layer that is chosen")
            raise UnsupportedModelError(why)
        kept = trace.examples, trace.joint
        inputs = trace.inputs
        return DepthSpectra(
            tuple(trace.layers),
            segment_spectra([*pairwise(places)], *kept),
            None
            if inputs is None
            else segment_spectra(
                [(inputs, place) for place in places], *kept, products=False
            ),
            segment_spectra([(place, trace.outputs) for place in places], *kept),
        )

    found = traced(
        model,
        x,
        lambda: chosen_layers(model, layers),
        spectra,
        output_fn=output_fn,
        mode=mode,
        count=count,
    )
    return DepthSpectra(
        found[0].names,
        SegmentSpectra.joined([part.step for part in found]),
        None
        if found[0].from_input is None
        else SegmentSpectra.joined([p.from_input for p in found if p.from_input]),
        SegmentSpectra.joined([part.to_output for part in found]),
    )


def input_spectra(
    model: nn.Module,
    x: Inputs,
    *,
    output_fn: OutputFunction | None = None,
    mode: Mode = "eval",
    count: int | None = None,
) -> SegmentSpectra:
    """Size and extremes of the singular values of ∂f/∂x, however wide it is.

    Args:
        model: Any module; left exactly as it was.
        x: n inputs: a tensor, or a nested tuple or mapping of tensors.
        output_fn: `(model, x) -> (n, ...)`; default `model(x)`.
        mode: `"eval"` or `"train"`, as in `empirical_ntk`.
        count: Of how many examples, the first ones, Jacobians are taken; None for all.

    Returns:
        One Jacobian of each example; `SegmentSpectra` says what is exact.

    Raises:
        ValueError: If there is no example, or an argument is not understood.
        UnsupportedModelError: If no input is floating, the outputs are random, or a
            reentrant checkpoint hides gradients.

    Example:
        >>> input_spectra(nn.Linear(3, 2), torch.randn(4, 3)).isometry_gap.shape
        torch.Size([1, 4])
    """

    def spectra(trace: Trace) -> SegmentSpectra:
        pair = trace.floating_inputs(), trace.outputs
        return segment_spectra([pair], trace.examples, trace.joint)

    (found,) = traced(
        model, x, dict, spectra, output_fn=output_fn, mode=mode, count=count
    )
    return found


def _module_of(call: str, named: dict[str, nn.Module]) -> str:
    """The name of the module of a call such as `block.call2`."""
    name = call if call in named else call.rpartition(".call")[0]
    if name not in named or not name:
        known = ", ".join(repr(name) for name in named if name)
        raise ValueError(
            f"layer_jacobian: no module is called {call!r}; there are {known or 'none'}"
            ". Take None for the inputs or the outputs of the model."
        )
    return name

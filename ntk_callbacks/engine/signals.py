"""Signals by depth: what each layer passes on, and the gradient that comes back."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ntk_callbacks._types import Inputs, Mode, OutputFunction, Params
from ntk_callbacks.engine.affine import layer_scales
from ntk_callbacks.engine.arguments import check_choice
from ntk_callbacks.engine.backward import graph_nodes
from ntk_callbacks.engine.coupling import refuse_randomness
from ntk_callbacks.engine.layer_calls import (
    LayerFilter,
    batch_axes,
    check_layers,
    chosen_layers,
    nothing_to_see,
    watched,
)
from ntk_callbacks.errors import UnsupportedModelError
from ntk_callbacks.functional import ModelFunction
from ntk_callbacks.guard import measuring
from ntk_callbacks.layout import widened
from ntk_callbacks.nested import batch_size

_SAMPLE = 1024  # entries of each layer's inputs and outputs that are kept
_UNREACHED = torch.zeros(1)  # the gradient by a signal on which no output depends


@dataclass(frozen=True)
class LayerSignal:
    """One call of one layer.

    Args:
        name: Name of the layer; its second call ends in `.call2`.
        covariance: (1/N) Σₖ h_k(xᵢ) h_k(xⱼ) of its N outputs h, float64; of one example
            only, all NaN, where the examples have no axis of their own.
        q: Mean of h² over outputs and examples.
        gradient_square: Mean of δ² over outputs and examples, δ the gradient by h;
            NaN where gradients are off, 0 where nothing depends on h.
        units: N, outputs of one example: channels times positions.
        sigma_w: √(fan_in ⟨W²⟩) of the weights in use; NaN for layers without.
        sigma_b: √⟨b²⟩.
        inputs: The first entries of what the layer was given.
        outputs: The first entries of h.
        sizes: Number of all entries of both.
    """

    name: str
    covariance: Float[Tensor, "n n"]
    q: float
    gradient_square: float
    units: float
    sigma_w: float
    sigma_b: float
    inputs: Tensor
    outputs: Tensor
    sizes: tuple[int, int]

    @property
    def c(self) -> float:
        """Mean over pairs of examples of q_ij/√(q_ii q_jj); NaN for one example."""
        return mean_correlation(self.covariance)


@dataclass(frozen=True)
class SignalStatistics:
    """Signals of all layers, in the order in which the forward pass calls them.

    Args:
        layers: At least one.
    """

    layers: tuple[LayerSignal, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers."""
        return tuple(layer.name for layer in self.layers)

    @property
    def q(self) -> Float[Tensor, " l"]:
        """Mean squared pre-activation of each layer."""
        return self._by_depth([layer.q for layer in self.layers])

    @property
    def c(self) -> Float[Tensor, " l"]:
        """Mean correlation of two examples at each layer, in [−1, 1]."""
        return self._by_depth([layer.c for layer in self.layers])

    @property
    def gradient_square(self) -> Float[Tensor, " l"]:
        """Mean squared back-propagated gradient at each layer."""
        return self._by_depth([layer.gradient_square for layer in self.layers])

    @property
    def chi(self) -> Float[Tensor, " steps"]:
        """χ between successive layers: Σδ² before over Σδ² behind, sums over outputs.

        Sums, not means, because layers may differ in width: for wide layers of random
        weights this is σ_w² E φ'², whatever their widths.
        """
        units = self._by_depth([layer.units for layer in self.layers])
        totals = units * self.gradient_square
        return totals[:-1] / totals[1:]

    @staticmethod
    def _by_depth(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)


def signal_statistics(
    model: nn.Module,
    x: Inputs,
    *,
    targets: Tensor | None = None,
    layers: LayerFilter = None,
    output_fn: OutputFunction | None = None,
    mode: Mode = "eval",
) -> SignalStatistics:
    """Size and correlation of the signals, and size of the gradients, by depth.

    Signals h are what the layers return: the pre-activations of linear and
    convolutional ones, over channels and positions alike. Gradients are those of
    Σᵢ uᵢ·f(xᵢ) with a random unit vector uᵢ for each example (the same at every call);
    with `targets`, of the summed losses: cross-entropy for class indices, ½|f − y|² for
    real targets. For another loss let `output_fn` return the losses of the examples.

    A layer that is called twice counts twice. Layers that are never called as modules
    (projections inside `nn.MultiheadAttention`, recurrent layers) are left out. One
    forward and one backward pass of all examples are held in memory at a time.

    Args:
        model: Any module; left exactly as it was.
        x: n inputs: a tensor, or a nested tuple or mapping of tensors.
        targets: None, class indices `(n,)`, or real targets of the size of the outputs.
        layers: None for the linear and convolutional layers that an output depends on;
            a regular expression, searched in the names of all these; types, or a
            predicate `(name, module)`, which alone decide. Of recurrent layers the
            signals are the hidden states.
        output_fn: `(model, x) -> (n, ...)`; default `model(x)`.
        mode: `"eval"` or `"train"`, as in `empirical_ntk`.

    Returns:
        `names`, and by depth `q`, `c`, `gradient_square` (all of length L) and `chi`
        (L − 1), float64.

    Raises:
        ValueError: If there is no example, or an argument is not understood.
        UnsupportedModelError: If no selected layer is called, one returns several
            tensors, the outputs are random, or a reentrant checkpoint hides gradients.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1))
        >>> _ = net[0].weight.data.copy_(2 * torch.eye(2))
        >>> found = signal_statistics(net, torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        >>> found.names, round(found.layers[0].q, 6), round(found.layers[0].c, 6)
        (('0', '1'), 3.0, 0.707107)

    References:
        Poole et al. 2016, arXiv:1606.05340 (q, c); Schoenholz et al. 2017,
        arXiv:1611.01232 (gradients, χ, depth scales).
    """
    check_layers(layers)
    check_choice("mode", mode, get_args(Mode))
    with measuring(model, mode):
        function = ModelFunction(model, output_fn=output_fn, parameters=_every)
        x = function.prepare(x)
        n = batch_size(x)
        if n == 0:
            raise ValueError("signal_statistics: the inputs hold no example.")
        chosen = chosen_layers(model, layers)
        refuse_randomness(function, x)
        axis = batch_axes(function, x, chosen)
        signals: list[LayerSignal] = []
        edges: list[GradientEdge | None] = []

        def seen(name: str, module: nn.Module, given: list[Tensor], h: Tensor) -> None:
            # Now, and the edge instead of h: an activation may work in place.
            edges.append(get_gradient_edge(h) if h.requires_grad else None)
            signals.append(
                _signal_of(name, module, given, h.detach(), n, axis(name, h.shape))
            )

        with ExitStack() as watching:
            watching.enter_context(watched(chosen, seen))

            def backward(outputs: Tensor) -> list[Tensor | None]:
                watching.close()  # checkpoints call layers again on the way back
                return _gradients(_number(outputs, targets), edges)

            gradients = function.during(_leaves(function), x, backward)
        if not signals:
            why = nothing_to_see(model, layers, "calls no layer that is chosen")
            raise UnsupportedModelError(why)
    pairs = list(zip(signals, gradients, strict=True))
    if layers is None:  # a second head, say, is on no way to the outputs
        pairs = [pair for pair in pairs if pair[1] is not _UNREACHED] or pairs
    return SignalStatistics(
        tuple(replace(s, gradient_square=_mean_square(g)) for s, g in pairs)
    )


def mean_correlation(covariance: Float[Tensor, "n n"]) -> float:
    """Mean over pairs i < j of q_ij/√(q_ii q_jj); NaN where there is no pair."""
    deviations = covariance.diagonal().sqrt()
    i, j = torch.triu_indices(len(deviations), len(deviations), offset=1)
    return float((covariance[i, j] / (deviations[i] * deviations[j])).mean())


def _every(_name: str, _parameter: nn.Parameter) -> bool:
    return True


def _leaves(function: ModelFunction) -> Params:
    """All parameters with gradients: signals of frozen layers have gradients too."""
    return {
        name: tensor.detach().requires_grad_(tensor.is_floating_point())
        for name, tensor in (function.params | function.fixed).items()
    }


def _signal_of(
    name: str,
    module: nn.Module,
    given: list[Tensor],
    h: Tensor,
    n: int,
    axis: int | None,
) -> LayerSignal:
    inputs = given[0].detach() if given else h.new_zeros(0)
    sigma_w, sigma_b = layer_scales(module, inputs, h)
    if axis is None:
        covariance = torch.full((n, n), torch.nan, dtype=torch.float64)
    else:
        rows = widened(h).movedim(axis, 0).reshape(n, -1)
        covariance = (rows @ rows.mT / rows.shape[1]).cpu()
    return LayerSignal(
        name=name,
        covariance=covariance,
        q=_mean_square(h),
        gradient_square=torch.nan,
        units=h.numel() / n,
        sigma_w=sigma_w,
        sigma_b=sigma_b,
        inputs=inputs.flatten()[:_SAMPLE].clone(),
        outputs=h.flatten()[:_SAMPLE].clone(),
        sizes=(inputs.numel(), h.numel()),
    )


def _mean_square(values: Tensor | None) -> float:
    return torch.nan if values is None else float(widened(values).square().mean())


def _number(outputs: Float[Tensor, "n c"], targets: Tensor | None) -> Tensor:
    """What is differentiated: a sum over the examples."""
    if targets is None:
        seeded = torch.Generator().manual_seed(0)
        directions = torch.randn(outputs.shape, generator=seeded, dtype=torch.float64)
        units = nn.functional.normalize(directions, dim=1)
        return (outputs * units.to(outputs)).sum()
    targets = targets.detach().to(outputs.device)
    n, c = outputs.shape
    if targets.is_floating_point() and targets.numel() == outputs.numel():
        gaps = outputs - targets.reshape(n, c).to(outputs)
        return gaps.square().sum().div(2)
    if targets.dtype == torch.long and targets.numel() == n and c > 1:
        classes = targets.reshape(n)
        if int(classes.min()) >= 0 and int(classes.max()) < c:
            logs = outputs.log_softmax(1)
            loss: Tensor = -logs.gather(1, classes[:, None]).sum()
            return loss
    raise ValueError(
        f"signal_statistics: targets of shape {tuple(targets.shape)} and "
        f"{targets.dtype} for outputs {(n, c)}; expected class indices (n,) below c, "
        "or real targets of the size of the outputs. For another loss pass an "
        "`output_fn` that returns the losses of the examples, and no targets."
    )


def _gradients(number: Tensor, edges: list[GradientEdge | None]) -> list[Tensor | None]:
    """Gradient by each signal; None where the forward pass kept no graph."""
    if any("CheckpointFunction" in node.name() for node in graph_nodes(number)):
        raise UnsupportedModelError(
            "a reentrant checkpoint hides the gradients inside it. Call "
            "checkpoint(..., use_reentrant=False)."
        )
    known = {i: edge for i, edge in enumerate(edges) if edge is not None}
    found: list[Tensor | None] = [None] * len(edges)
    if known and number.requires_grad:
        rows = torch.autograd.grad(number, list(known.values()), allow_unused=True)
        for i, row in zip(known, rows, strict=True):
            found[i] = _UNREACHED if row is None else row
    return found

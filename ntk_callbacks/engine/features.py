"""Features: what the last layer of a network reads, and their Gram matrix."""

from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ntk_callbacks._types import Inputs, Mode, OutputFunction
from ntk_callbacks.engine.affine import is_affine
from ntk_callbacks.engine.arguments import check_choice
from ntk_callbacks.engine.coupling import forward, refuse_randomness
from ntk_callbacks.engine.layer_calls import example_axis, hooked
from ntk_callbacks.errors import UnsupportedModelError
from ntk_callbacks.functional import ModelFunction
from ntk_callbacks.guard import measuring
from ntk_callbacks.layout import symmetric, widened
from ntk_callbacks.nested import batch_size, examples, leaves

_MOST_NAMES = 24  # that an error message lists


def conjugate_kernel(
    model: nn.Module,
    x: Inputs,
    x2: Inputs | None = None,
    *,
    layer: str | None = None,
    output_fn: OutputFunction | None = None,
    mode: Mode = "eval",
) -> Float[Tensor, "n1 n2"]:
    """Conjugate kernel K[i, j] = (1/N) Σₖ hₖ(xᵢ) hₖ(x2ⱼ) of the N features h.

    The Gram matrix of the penultimate layer, or of a named one, divided by the width:
    entries stay of order one as networks get wider. For wide random layers behind an
    activation it is E φ(u) φ(v); σ_w² K + σ_b² is then the kernel of the Gaussian
    process that the next layer draws (NNGP). `layer_features` says what h is.

    Args:
        model: Any module; left exactly as it was.
        x: n1 inputs: a tensor, or a nested tuple or mapping of tensors.
        x2: n2 inputs of the other side; None for the kernel of `x` with itself.
        layer: As in `layer_features`.
        output_fn: `(model, x) -> (n, ...)`; default `model(x)`.
        mode: `"eval"` or `"train"`, as in `empirical_ntk`; in training mode each side
            has the batch statistics of its own.

    Returns:
        Kernel (n1, n2) in the dtype of the features, summed in float64; symmetric to
        the last bit and positive semi-definite to round-off without `x2`.

    Raises:
        ValueError: If an argument is not understood, there is no such layer or no
            example, or the two sides differ in the number of their features.
        UnsupportedModelError: If the features cannot be told; see `layer_features`.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1))
        >>> _ = net[0].weight.data.copy_(2 * torch.eye(2))
        >>> x = torch.tensor([[1.0, -1.0], [1.0, 1.0]])
        >>> conjugate_kernel(net, x)  # features (2, 0) and (2, 2)
        tensor([[2., 2.],
                [2., 4.]])

    References:
        Neal 1996, "Priors for infinite networks"; Daniely, Frostig, Singer 2016,
        arXiv:1602.05897; Lee et al. 2018, arXiv:1711.00165.
    """
    settings: dict[str, Any] = {"layer": layer, "output_fn": output_fn, "mode": mode}
    first = layer_features(model, x, **settings)
    if x2 is None:
        return symmetric(_gram(first, first).to(first))
    second = layer_features(model, x2, **settings)
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"conjugate_kernel: {first.shape[1]} features of an example of x, "
            f"{second.shape[1]} of one of x2. Inputs need the same size (pad sequences "
            "to one length), or name a layer behind a pooling."
        )
    return _gram(first, second).to(first)


def layer_features(
    model: nn.Module,
    x: Inputs,
    *,
    layer: str | None = None,
    output_fn: OutputFunction | None = None,
    mode: Mode = "eval",
) -> Float[Tensor, "n width"]:
    """Features of each example: what the last layer is given, or a layer returns.

    Without a name they are the input of the last layer that is called and has a weight
    of two axes or more (linear, convolutional, bilinear, recurrent; normalizations have
    none); for a model of one layer, the inputs of the model. With a name they are the
    output of that layer, of several tensors the first (the hidden states of a recurrent
    layer). If a layer is called several times its last call counts.

    All axes but that of the examples are flattened: positions of an image and tokens of
    a sequence count as features like channels do. For means over positions, name a
    layer behind the pooling, or pass an `output_fn` that pools with `layer=""`.

    Args:
        model: Any module; left exactly as it was.
        x: n inputs: a tensor, or a nested tuple or mapping of tensors.
        layer: None for the penultimate features; a name in `model.named_modules()`;
            `""` for the outputs of the model, or of `output_fn`, themselves.
        output_fn: `(model, x) -> (n, ...)`; default `model(x)`.
        mode: `"eval"` or `"train"`, as in `empirical_ntk`.

    Returns:
        Features (n, N), without a graph, in the dtype (float32 for half-precision
        models) and on the device of the parameters.

    Raises:
        ValueError: If an argument is not understood, there is no such layer, or no
            example.
        UnsupportedModelError: If the layer is not called, returns no floating tensor or
            one in which the examples have no axis of their own; if no layer with
            weights is called as a module; or if outputs are random.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> x = torch.ones(5, 3)
        >>> layer_features(net, x).shape, layer_features(net, x, layer="2").shape
        (torch.Size([5, 4]), torch.Size([5, 2]))
    """
    check_layer(layer)
    check_choice("mode", mode, get_args(Mode))
    named = {_plain(name): part for name, part in model.named_modules()}
    if layer is not None and layer not in named:
        raise ValueError(
            f"layer={layer!r} is no layer of {type(model).__name__}; it has "
            f"{_listed(name for name in named if name)}."
        )
    with measuring(model, mode):
        function = ModelFunction(model, output_fn=output_fn, parameters=_every)
        x = function.prepare(x)
        n = batch_size(x)
        if n == 0:
            raise ValueError("layer_features: the inputs hold no example.")
        refuse_randomness(function, x)
        if layer == "":
            return forward(function, x)
        watched = named if layer is None else {layer: named[layer]}
        features = _seen(function, x, watched, penultimate=layer is None)
        if features is None:
            raise UnsupportedModelError(_unseen(model, layer, named))
        if n == 1:
            return features.reshape(1, -1)
        axis = example_axis(features.shape, _fewer(function, x, watched, layer), n)
        if axis is None:
            raise UnsupportedModelError(
                f"the features of {type(model).__name__} have shape "
                f"{tuple(features.shape)} for {n} examples, which have no axis of "
                f"their own. Name another layer: {_listed(named)}."
            )
        return features.movedim(axis, 0).reshape(n, -1)


def check_layer(layer: object) -> None:
    """Refuse what can be no layer of any model.

    Args:
        layer: As in `layer_features`.

    Raises:
        ValueError: If it is neither None nor a name.
    """
    if not (layer is None or isinstance(layer, str)):
        raise ValueError(
            f"layer={layer!r}; expected the name of a layer as model.named_modules() "
            "has it, or None for what the last layer reads."
        )


def _seen(
    function: ModelFunction,
    x: Inputs,
    watched: dict[str, nn.Module],
    *,
    penultimate: bool,
) -> Tensor | None:
    """What the layer read or returned at the last call in one forward pass."""
    latest: list[Tensor] = []

    def hook(_module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        tensors = leaves((args, kwargs) if penultimate else result)
        floating = [tensor for tensor in tensors if tensor.is_floating_point()]
        if floating:
            # A copy: what follows may work in place, on residual streams too.
            latest[:] = [floating[0].detach().clone()]

    chosen = [
        part
        for name, part in watched.items()
        if not penultimate or _has_weights(name, part)
    ]
    with hooked((part, hook) for part in chosen):
        forward(function, x)
    return latest[0] if latest else None


def _fewer(
    function: ModelFunction, x: Inputs, watched: dict[str, nn.Module], layer: str | None
) -> torch.Size | None:
    """Shape of the features of all examples but the last, if they can be run alone."""
    try:
        rest = examples(x, 0, batch_size(x) - 1)
        found = _seen(function, rest, watched, penultimate=layer is None)
    except Exception:  # whatever a model raises that needs its whole batch
        return None
    return None if found is None else found.shape


def _has_weights(name: str, module: nn.Module) -> bool:
    """Whether a module is a layer by itself; a model that merely holds some is none."""
    if is_affine(module):
        return True
    alone = bool(name) and next(module.children(), None) is None
    return alone and any(weight.ndim >= 2 for weight in module.parameters())


def _unseen(model: nn.Module, layer: str | None, named: dict[str, nn.Module]) -> str:
    who = type(model).__name__
    if layer is None:
        return (
            f"{who} calls no layer with weights as a module, so its penultimate "
            f"features cannot be told. Name a layer whose output they are, of "
            f"{_listed(named)}, or return them from `output_fn` and pass layer=''."
        )
    return (
        f"{who} does not call layer={layer!r} ({type(named[layer]).__name__}) as a "
        f"module, or it returns no floating tensor. Name another: {_listed(named)}."
    )


def _listed(names: Any) -> str:
    known = [name for name in names if name]
    more = f", … ({len(known)} in all)" if len(known) > _MOST_NAMES else ""
    return ", ".join(known[:_MOST_NAMES]) + more or "no submodules"


def _plain(name: str) -> str:
    """The name of a module before `torch.compile` wrapped what holds it."""
    return name.replace("_orig_mod.", "")


def _every(_name: str, _parameter: nn.Parameter) -> bool:
    return True


def _gram(
    first: Float[Tensor, "n1 k"], second: Float[Tensor, "n2 k"]
) -> Float[Tensor, "n1 n2"]:
    rows: Tensor = widened(first) @ widened(second).mT
    return rows / first.shape[1]

"""Jacobians between the states of a recurrent network: ∂h_T/∂h_t, by time."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ntk_callbacks._types import Inputs, Mode, OutputFunction
from ntk_callbacks.engine.layer_calls import LayerFilter, check_layers, hooked
from ntk_callbacks.engine.segment_spectra import SegmentSpectra, segment_spectra
from ntk_callbacks.engine.segments import Place
from ntk_callbacks.engine.traces import Subject, opened, run
from ntk_callbacks.errors import UnsupportedModelError
from ntk_callbacks.functional import compiled
from ntk_callbacks.nested import batch_size, leaves, map_tensors

_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_MOST_TIMES = 32
_SAME = 1e-3  # of the state: float32 sums in another order are off by 1e-6 or so


@dataclass(frozen=True)
class TimeSpectra:
    """Singular values of the Jacobians between the states z_1, …, z_T of one module.

    Args:
        times: The t < T that were taken: all, or 32 evenly spread over a longer time.
        length: T.
        step: Of ∂z_{t+1}/∂z_t.
        to_end: Of ∂z_T/∂z_t.
    """

    times: Int[Tensor, " k"]
    length: int
    step: SegmentSpectra
    to_end: SegmentSpectra


@dataclass
class _Calls:
    """What a recurrent module was given, and its states after each call."""

    given: tuple[Tensor, Any] | None
    states: list[tuple[Tensor, ...]]


def jacobian_by_time(
    model: nn.Module,
    x: Inputs,
    *,
    layers: LayerFilter = None,
    output_fn: OutputFunction | None = None,
    mode: Mode = "eval",
    count: int | None = None,
) -> dict[str, TimeSpectra]:
    """Singular values of ∂z_{t+1}/∂z_t and ∂z_T/∂z_t of recurrent modules.

    The state z_t is all that is carried from step to step: h, with the c of an LSTM,
    of all layers of the module, flattened. `nn.RNN`, `nn.GRU` and `nn.LSTM` called once
    are run again, step by step on the inputs that they were given, which is the same
    computation. Of one called several times, and of cells in a loop of one's own, each
    call is a step; its state is then what the module returns as such (of `nn.GRU` the
    second result), and derivatives go along every path from one call to another.

    Args:
        model: Any module; left exactly as it was.
        x: n inputs: a tensor, or a nested tuple or mapping of tensors.
        layers: None for all recurrent modules; a regular expression, searched in their
            names; types, or a predicate `(name, module)`.
        output_fn: `(model, x) -> (n, ...)`; default `model(x)`.
        mode: `"eval"` or `"train"`, as in `empirical_ntk`.
        count: Of how many examples, the first ones, Jacobians are taken; None for all.

    Returns:
        Name of the module -> `TimeSpectra(times, length, step, to_end)`; the extremes
        of ∂z_T/∂z_t are NaN where it is too wide to be formed, see `SegmentSpectra`.

    Raises:
        ValueError: If there is no example, or an argument is not understood.
        UnsupportedModelError: If there is no recurrent module, one is bidirectional (it
            has no state that goes one way), packed, or takes a single step, or the
            outputs are random.

    Example:
        >>> net = nn.RNN(1, 1, nonlinearity="relu", batch_first=True)
        >>> for weight in net.parameters():
        ...     _ = nn.init.constant_(weight, 0.5)
        >>> found = jacobian_by_time(
        ...     net, torch.ones(1, 4, 1), output_fn=lambda net, x: net(x)[0]
        ... )
        >>> found["RNN"].to_end.largest.flatten()
        tensor([0.1250, 0.2500, 0.5000], dtype=torch.float64)

    References:
        Chen, Pennington, Schoenholz 2018, arXiv:1806.05394; Gilboa et al. 2019,
        arXiv:1901.08987; Pascanu, Mikolov, Bengio 2013, arXiv:1211.5063.
    """
    check_layers(layers)
    chosen = _chosen(model, layers)
    calls: dict[str, _Calls] = {}
    with opened(model, x, output_fn, mode, count) as subject:

        def finish(_inputs: Place | None, _outputs: Place) -> dict[str, TimeSpectra]:
            if not calls:
                raise UnsupportedModelError(
                    f"{subject.function.name} does not call {', '.join(chosen)}: there "
                    "is no state to differentiate by."
                )
            return {
                name or type(chosen[name]).__name__: _spectra(
                    name, chosen[name], seen, subject
                )
                for name, seen in calls.items()
            }

        return run(subject, _recorded(chosen, calls), finish)


def _chosen(model: nn.Module, layers: LayerFilter) -> dict[str, nn.Module]:
    named = {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, _RECURRENT)
    }
    found: dict[str, nn.Module]
    if isinstance(layers, type | tuple):
        found = {name: part for name, part in named.items() if isinstance(part, layers)}
    elif callable(layers):
        found = {name: part for name, part in named.items() if layers(name, part)}
    else:
        pattern = compiled("layers", "" if layers is None else layers)
        found = {name: part for name, part in named.items() if pattern.search(name)}
    if not found:
        asked = "" if layers is None else f" chosen by layers={layers!r}"
        raise UnsupportedModelError(
            f"{type(model).__name__} has no recurrent module{asked}; it has "
            f"{', '.join(named) or 'none'}. States are those of nn.RNN, nn.GRU, "
            'nn.LSTM and their cells; for other networks measure by="depth".'
        )
    return found


@contextmanager
def _recorded(chosen: dict[str, nn.Module], calls: dict[str, _Calls]) -> Iterator[None]:
    """Fill `calls` while it is open."""

    def hook(name: str, module: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
        bound = signature(module.forward).bind(*args, **kwargs).arguments
        given, *rest = bound.values()
        # Copies go on instead, so that no path leads from the c of an LSTM to its h:
        # both are the state, side by side.
        result = map_tensors(Tensor.clone, result)
        state = result[1] if isinstance(module, nn.RNNBase) else result
        if isinstance(given, PackedSequence):
            raise UnsupportedModelError(
                f"{name!r} is given a packed sequence, whose examples end at different "
                "times. Measure on examples of one length that are not packed."
            )
        seen = calls.setdefault(name, _Calls(None, []))
        seen.given = given, rest[0] if rest else None
        seen.states.append(tuple(leaves(state)))
        return result

    with hooked((module, partial(hook, name)) for name, module in chosen.items()):
        yield


def _spectra(
    name: str, module: nn.Module, seen: _Calls, subject: Subject
) -> TimeSpectra:
    if getattr(module, "bidirectional", False):
        raise UnsupportedModelError(
            f"{name!r} is bidirectional: half of its state runs backwards, and there "
            "is no ∂h_T/∂h_t. Measure another module by layers=, or its signals with "
            "SignalMonitor."
        )
    states = seen.states
    if isinstance(module, nn.RNNBase) and len(states) == 1 and seen.given is not None:
        states = _unrolled(name, module, *seen.given, states[0])
    length = len(states)
    if length < 2:
        raise UnsupportedModelError(
            f"{name!r} takes one step only: there is no time between two states."
        )
    n = batch_size(subject.x)
    axis = 1 if isinstance(module, nn.RNNBase) else 0
    for tensor in states[0]:
        if tensor.ndim <= axis or tensor.shape[axis] != n:
            raise UnsupportedModelError(
                f"the state of {name!r} has the shape {tuple(tensor.shape)}, without "
                f"one entry for each of {n} examples along axis {axis}. Pass batches, "
                "one sequence for each example."
            )
    spread = torch.linspace(1, length - 1, min(length - 1, _MOST_TIMES))
    times = spread.round().long()
    places = [
        Place.of(list(state), [axis] * len(state), n) if i else None
        for i, state in enumerate([(), *states])
    ]
    kept = subject.examples, subject.joint
    known = {t: place for t, place in enumerate(places) if place is not None}
    return TimeSpectra(
        times,
        length,
        segment_spectra([(known[t], known[t + 1]) for t in times.tolist()], *kept),
        segment_spectra(
            [(known[t], known[length]) for t in times.tolist()],
            *kept,
            products=False,
        ),
    )


def _unrolled(
    name: str, module: nn.RNNBase, x: Tensor, hx: Any, final: tuple[Tensor, ...]
) -> list[tuple[Tensor, ...]]:
    """The states after every step, by calls on one step each."""
    axis = 1 if module.batch_first else 0
    if x.ndim != 3:
        raise UnsupportedModelError(
            f"{name!r} is given inputs of shape {tuple(x.shape)}; expected batches of "
            "sequences, three axes."
        )
    if hx is not None:
        hx = tuple(h.detach() for h in hx) if isinstance(hx, tuple) else hx.detach()
    states = []
    for t in range(x.shape[axis]):
        _, hx = module.forward(x.detach().narrow(axis, t, 1), hx)
        states.append(tuple(leaves(hx)))
    for mine, theirs in zip(states[-1], final, strict=True):
        if not torch.allclose(mine, theirs, rtol=_SAME, atol=_SAME, equal_nan=True):
            raise UnsupportedModelError(
                f"{name!r} ({type(module).__name__}) run step by step ends in another "
                "state than in one go: its steps are not those of torch's own module."
            )
    return states

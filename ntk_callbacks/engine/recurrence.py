"""Recurrent layers, step by step in functions that have rules.

torch computes a whole sequence in one call, in which a weight meets the data at every
step: no single rule fits. Here the same numbers come from one product with the inputs
of all steps, and one with the state at each step.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - as torch calls it

State: TypeAlias = tuple[Tensor, ...]
"""What goes on from step to step: h, with the c of an LSTM."""

Step: TypeAlias = Callable[[Tensor, Tensor, State], State]
"""`(W_ih x + b_ih, W_hh h + b_hh, state)` -> the next state."""


def _plain(
    given: Tensor, hidden: Tensor, _: State, activation: Callable[[Tensor], Tensor]
) -> State:
    return (activation(given + hidden),)


def _gru(given: Tensor, hidden: Tensor, state: State) -> State:
    reset, update, new = given.chunk(3, -1)
    own_reset, own_update, own_new = hidden.chunk(3, -1)
    n = torch.tanh(new + torch.sigmoid(reset + own_reset) * own_new)
    z = torch.sigmoid(update + own_update)
    return (n + z * (state[0] - n),)


def _lstm(given: Tensor, hidden: Tensor, state: State) -> State:
    i, f, g, o = (given + hidden).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _of_data(x: Tensor, state: State) -> State:
    """A state that counts as computed from the inputs, as those after it do."""
    return tuple(part + x.new_zeros(part.shape) for part in state)


def _cell(
    step: Step,
    input: Tensor,
    hx: Tensor | Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor | State:
    """`torch.gru_cell` and its like."""
    state = _of_data(input, (hx,) if isinstance(hx, Tensor) else tuple(hx))
    given, hidden = F.linear(input, w_ih, b_ih), F.linear(state[0], w_hh, b_hh)
    state = step(given, hidden, state)
    return state[0] if isinstance(hx, Tensor) else state


_ARGUMENTS = (
    *("input", "hx", "params", "has_biases", "num_layers"),
    *("dropout", "train", "bidirectional", "batch_first"),
)
_LONGEST = 256  # steps; more take longer one by one than in a call for each row of J


def _layers(step: Step, *args: Any, **kwargs: Any) -> State | None:
    """`torch.gru` and its like; None for packed or long sequences, and for dropout."""
    given = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
    has_biases = given.get("has_biases")
    if not isinstance(has_biases, bool):  # packed: all are one place further on
        return None
    x, hx, weights = given["input"], given["hx"], given["params"]
    num_layers, bidirectional = given["num_layers"], given["bidirectional"]
    batch_first = given.get("batch_first", False)
    long = x.shape[1 if batch_first else 0] > _LONGEST
    if long or x.is_meta or (given["train"] and given["dropout"]):
        return None
    x = x.transpose(0, 1) if batch_first else x  # steps first
    starts = [part.unbind(0) for part in ([hx] if isinstance(hx, Tensor) else hx)]
    directions = 2 if bidirectional else 1
    per_cell = len(weights) // (num_layers * directions)
    ends: list[State] = []
    for layer in range(num_layers):
        found = []
        for direction in range(directions):
            at = layer * directions + direction
            own = weights[at * per_cell : (at + 1) * per_cell]
            state = _of_data(x, tuple(start[at] for start in starts))
            outputs, state = _sequence(
                step, x, state, own, has_biases, backwards=direction == 1
            )
            found.append(outputs)
            ends.append(state)
        x = torch.cat(found, -1) if bidirectional else found[0]
    last = tuple(torch.stack(parts) for parts in zip(*ends, strict=True))
    return (x.transpose(0, 1) if batch_first else x, *last)


def _sequence(
    step: Step,
    x: Tensor,
    state: State,
    weights: Sequence[Tensor],
    has_biases: bool,
    backwards: bool,
) -> tuple[Tensor, State]:
    """The outputs of all steps, `(steps, examples, h)`, and the last state."""
    w_ih, w_hh = weights[:2]
    b_ih, b_hh = weights[2:4] if has_biases else (None, None)
    projection = weights[-1] if len(weights) % 2 else None  # of an LSTM with proj_size
    given = F.linear(x, w_ih, b_ih).unbind(0)
    outputs = []
    for now in reversed(given) if backwards else given:
        state = step(now, F.linear(state[0], w_hh, b_hh), state)
        if projection is not None:
            state = (F.linear(state[0], projection), *state[1:])
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs), state


_STEPS: dict[str, Step] = {
    "rnn_tanh": partial(_plain, activation=torch.tanh),
    "rnn_relu": partial(_plain, activation=torch.relu),
    "gru": _gru,
    "lstm": _lstm,
}

UNROLLED: dict[Callable[..., Any], Callable[..., Any]] = {
    getattr(torch, name + suffix): partial(form, step)
    for name, step in _STEPS.items()
    for suffix, form in (("", _layers), ("_cell", _cell))
}
"""Torch function -> the same in functions with rules; or None."""

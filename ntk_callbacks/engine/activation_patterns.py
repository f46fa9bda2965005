"""Activation patterns: on which linear piece of its gates each activation lies.

A network of ReLU-like gates is linear wherever no activation crosses an elbow; the
pattern says on which side of its elbows every one is.
"""

from dataclasses import dataclass
from typing import Any, get_args

import torch
from jaxtyping import Bool, UInt8
from torch import Tensor, nn
from torch.nn import functional

from ntk_callbacks._types import Inputs, Mode, OutputFunction
from ntk_callbacks.engine.arguments import check_choice
from ntk_callbacks.engine.coupling import forward
from ntk_callbacks.engine.gates import Gate, gate_calls
from ntk_callbacks.functional import ModelFunction
from ntk_callbacks.guard import measuring
from ntk_callbacks.nested import batch_size, examples


@dataclass(frozen=True)
class ActivationPattern:
    """Sides of the elbows at one call of a gate, on all examples.

    Args:
        bits: For each elbow e whether x > e, eight activations to a byte, on the CPU.
        size: Number of activations: examples times units.
        units: Activations of one example: channels times positions.
        dead: How many of the units have slope 0 on every example; None where a gate is
            never flat.
    """

    bits: UInt8[Tensor, "elbows bytes"]
    size: int
    units: int
    dead: int | None

    def changed(self, other: "ActivationPattern") -> int:
        """How many activations lie on another piece than in `other`."""
        differing = self.bits ^ other.bits
        anywhere = differing[0].clone()
        for row in differing[1:]:
            anywhere |= row
        return int(_ONES[anywhere.int()].sum())


def activation_patterns(
    model: nn.Module,
    x: Inputs,
    *,
    output_fn: OutputFunction | None = None,
    mode: Mode = "eval",
) -> dict[str, ActivationPattern]:
    """Pattern of every call of a ReLU-like gate in a forward pass.

    Gates are the functions in `GATES`, called by modules or by the code of a `forward`,
    in place or not. Positions of images and tokens of sequences count as activations of
    their own. Gates of tensors that do not grow with the examples (weights) are no
    part of it. Takes one bit for each activation and elbow.

    Args:
        model: Any module; left exactly as it was.
        x: n ≥ 1 inputs: a tensor, or a nested tuple or mapping of tensors.
        output_fn: `(model, x) -> (n, ...)`; default `model(x)`.
        mode: `"eval"` or `"train"`, as in `empirical_ntk`.

    Returns:
        Name of the innermost module that calls the gate -> pattern, in the order of the
        calls; the second call in one module ends in `.call2`. Empty without gates.

    Raises:
        ValueError: If an argument is not understood.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
        >>> _ = net[0].weight.data.copy_(torch.eye(2))
        >>> x = torch.tensor([[1.0, -1.0], [2.0, -3.0]])
        >>> before = activation_patterns(net, x)["1"]
        >>> _ = net[0].weight.data[0].neg_()
        >>> after = activation_patterns(net, x)["1"]
        >>> before.size, before.dead, after.dead, after.changed(before)
        (4, 1, 2, 2)

    References:
        Hanin, Rolnick 2019, arXiv:1906.00904 (activation patterns).
    """
    check_choice("mode", mode, get_args(Mode))
    with measuring(model, mode):
        function = ModelFunction(model, output_fn=output_fn, parameters=_every)
        x = function.prepare(x)
        n = batch_size(x)
        fewer: dict[str, torch.Size] = {}

        def noted(name: str, _gate: Gate, _elbows: Any, h: Tensor) -> None:
            fewer[name] = h.shape

        if n > 1:
            try:
                with gate_calls(model, noted):
                    forward(function, examples(x, 0, n - 1))
            except Exception:  # whatever a model raises that needs its whole batch
                fewer.clear()
        found: dict[str, ActivationPattern] = {}

        def seen(name: str, gate: Gate, elbows: tuple[float, ...], h: Tensor) -> None:
            axis = _axis(h.shape, fewer.get(name), n)
            if axis is not None:
                found[name] = _pattern(h, gate, elbows, axis)

        with gate_calls(model, seen):
            forward(function, x)
    return found


def pattern_change(
    now: dict[str, ActivationPattern], before: dict[str, ActivationPattern]
) -> float:
    """Share of all activations that lie on another piece of their gate.

    Args:
        now: What `activation_patterns` returns; at least one gate.
        before: The same of another time.

    Returns:
        Value in [0, 1].

    Raises:
        ValueError: If the gates, or the numbers of their activations, differ.
    """
    sizes, sizes_before = (
        {name: (pattern.size, len(pattern.bits)) for name, pattern in patterns.items()}
        for patterns in (now, before)
    )
    if sizes != sizes_before:
        differ = sorted(dict(sizes.items() ^ sizes_before.items()))
        raise ValueError(
            f"the gates {differ} were not called, or had another number of activations "
            "or elbows: patterns of one model on the same inputs can be compared."
        )
    changed = sum(pattern.changed(before[name]) for name, pattern in now.items())
    return changed / sum(pattern.size for pattern in now.values())


def _axis(shape: torch.Size, fewer: torch.Size | None, n: int) -> int | None:
    """The axis that grows with the examples; None for tensors that do not."""
    if fewer is None:
        return 0 if shape[:1] == (n,) else None
    if len(shape) != len(fewer):
        return None
    # Shared with windows or time steps it still tells the units apart.
    return next((k for k in range(len(shape)) if shape[k] != fewer[k]), None)


def _pattern(
    h: Tensor, gate: Gate, elbows: tuple[float, ...], axis: int
) -> ActivationPattern:
    above = [h > elbow for elbow in elbows]
    dead = None
    if gate.sloped is not None:
        piece = torch.stack([side.to(torch.uint8) for side in above]).sum(0)
        sloped = torch.isin(piece, torch.tensor(gate.sloped, device=h.device))
        dead = int((~sloped.any(axis)).sum())
    return ActivationPattern(
        bits=torch.stack([_packed(side.flatten()) for side in above]).cpu(),
        size=h.numel(),
        units=h.numel() // h.shape[axis],
        dead=dead,
    )


def _packed(bits: Bool[Tensor, " m"]) -> UInt8[Tensor, " bytes"]:
    rows = functional.pad(bits.to(torch.uint8), (0, -len(bits) % 8)).view(-1, 8)
    places = torch.tensor([1 << k for k in range(8)], dtype=torch.uint8)
    return (rows * places.to(bits.device)).sum(1, dtype=torch.uint8)


def _every(_name: str, _parameter: nn.Parameter) -> bool:
    return True


_ONES = torch.tensor([value.bit_count() for value in range(256)])
"""Number of ones in a byte."""

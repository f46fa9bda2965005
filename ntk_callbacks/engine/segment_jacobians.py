"""∂(end)/∂(start) as matrices, for many pairs of places from few backward passes."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_callbacks.engine.segments import AUDITED, Place, Segment, pulled_back
from ntk_callbacks.errors import UnsupportedModelError
from ntk_callbacks.layout import widened

Pair: TypeAlias = tuple[Place, Place]
"""(start, end)"""

LARGEST_BLOCK = 2**26
"""Numbers of Jacobians that are held at a time."""
_MOST_TOGETHER = 32  # products in one pass: more gain nothing
_HELD = 2**22  # numbers of the widest place in one pass: layers between may be wider


def jacobians(
    pairs: Sequence[Pair], examples: int, joint: bool
) -> Iterator[Float[Tensor, "m c d"]]:
    """∂(end)/∂(start) of the first examples, for one pair after the other.

    A Jacobian c × d takes c products with rows, each of which serves all starts that
    share the end, or d products with columns, each of which serves all ends that share
    the start. Each pair goes the way on which its share of the products is smaller;
    neighbors on the same way go together, as far as memory goes.

    Args:
        pairs: Where derivatives are taken by, and what is differentiated.
        examples: How many examples.
        joint: As in `Segment`.

    Yields:
        The Jacobians, in order.
    """
    starts = Counter(id(start) for start, _ in pairs)
    ends = Counter(id(end) for _, end in pairs)
    waiting: list[Pair] = []
    ways: list[tuple[bool, int, torch.dtype]] = []
    for start, end in pairs:
        by_columns = start.size / starts[id(start)] < end.size / ends[id(end)]
        by_columns = by_columns and start.is_known and end.is_known
        way = by_columns, id(start if by_columns else end), end.like.dtype
        held = examples * sum(s.size * e.size for s, e in [*waiting, (start, end)])
        if waiting and (way != ways[-1] or held > LARGEST_BLOCK):
            yield from _formed(waiting, examples, joint, by_columns=ways[-1][0])
            waiting = []
        waiting.append((start, end))
        ways.append(way)
    if waiting:
        yield from _formed(waiting, examples, joint, by_columns=ways[-1][0])


def _formed(
    pairs: list[Pair], examples: int, joint: bool, *, by_columns: bool
) -> list[Float[Tensor, "m c d"]]:
    if not by_columns:
        return _by_rows([start for start, _ in pairs], pairs[0][1], examples, joint)
    ends = [end for _, end in pairs]
    found = _by_columns(pairs[0][0], ends, examples, joint)
    for i, (start, end) in enumerate(pairs):
        if found is None or not _agrees(found[i], start, end, joint):
            return [_by_rows([s], e, examples, joint)[0] for s, e in pairs]
    assert found is not None
    return found


def _by_rows(
    starts: list[Place], end: Place, examples: int, joint: bool
) -> list[Float[Tensor, "m c _"]]:
    def pulled(unit: Float[Tensor, " c"]) -> Float[Tensor, "m _"]:
        rows = pulled_back(starts, end, unit.expand(examples, -1), joint)
        return torch.cat(rows, 1)

    together = 1 if joint else _at_once([*starts, end], examples)
    rows = _of_each(pulled, torch.eye(end.size).to(end.like), together)
    return [*torch.split(rows.movedim(0, 1), [start.size for start in starts], 2)]


def _by_columns(
    start: Place, ends: list[Place], examples: int, joint: bool
) -> list[Float[Tensor, "m _ d"]] | None:
    """From J v; None where a backward pass cannot be differentiated."""
    segment = Segment(start, Place.joined(ends), examples, joint)

    def times(unit: Float[Tensor, " d"]) -> Float[Tensor, "m _"]:
        return segment.times(unit.expand(examples, -1))

    together = 1 if joint else _at_once([start, *ends], examples)
    try:
        columns = _of_each(times, torch.eye(start.size).to(start.like), together)
    except (RuntimeError, UnsupportedModelError):
        return None
    stacked = columns.permute(1, 2, 0)
    return list(torch.split(stacked, [end.size for end in ends], 1))


def _at_once(places: list[Place], examples: int) -> int:
    """How many products share a pass: what they hold grows with them."""
    widest = max(place.size for place in places)
    return max(1, min(_MOST_TOGETHER, _HELD // (examples * widest)))


def _of_each(
    product: Callable[[Tensor], Tensor], units: Float[Tensor, "k _"], together: int
) -> Float[Tensor, "k m _"]:
    """A product of every unit vector, many in one pass where the model allows it."""
    if together > 1:
        generator = torch.Generator().manual_seed(0)
        mix = torch.randn(len(units), generator=generator).to(units)
        mixed = product(mix)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # operators without a batching rule
                found = torch.vmap(product, chunk_size=together)(units)
        except Exception:  # a backward pass of the user's own may raise anything
            found = None
        if found is not None and _close(torch.tensordot(mix, found, 1), mixed):
            return found
    return torch.stack([product(unit) for unit in units])


def _close(first: Tensor, second: Tensor) -> bool:
    """Up to round-off; what is not known counts as nothing."""
    first, second = (widened(t).nan_to_num() for t in (first, second))
    return bool((first - second).norm() <= AUDITED * second.norm())


def _agrees(
    jacobian: Float[Tensor, "m c d"], start: Place, end: Place, joint: bool
) -> bool:
    """Whether uᵀJ is what a backward pass makes of u: some have a wrong derivative."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(jacobian.shape[:2], generator=generator).to(end.like)
    (pulled,) = pulled_back([start], end, u, joint)
    expected = widened(torch.einsum("mc,mcd->md", u, jacobian))
    scale = widened(jacobian).norm(dim=(1, 2))
    gap = (widened(pulled) - expected).norm(dim=1)
    return bool((gap <= AUDITED * scale).all())

"""Reading examples out of a data set without moving any state of it or its loader."""

import copy
import operator
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ntk_callbacks.errors import ProbeError
from ntk_callbacks.guard import isolated_rng
from ntk_callbacks.snapshot import contents_of, generator_state, refill

_MOST_TRANSFORMS = 1000  # longer containers hold the data


@contextmanager
def undisturbed(dataset: Any, seed: int) -> Iterator[None]:
    """Read examples inside; afterwards, on exceptions too, it never happened.

    Restored: the global generators (inside, they start from the seed) and those that
    the data set or its transforms keep; the attributes of the data set and of those it
    wraps (`dataset`, `datasets`, or any attribute that is a `Dataset`), and what is in
    attributes that are dicts, lists, sets or deques. What was opened for the reading
    and kept there is closed. Not restored: arrays written in place, containers in
    containers, attributes of transforms and other parts.
    """
    with isolated_rng(seed=seed), _own_generators_kept(dataset), _state_kept(dataset):
        yield


def indices_of(loader: Any) -> list[int] | None:
    """The examples that a loader's sampler picks from; None if it does not say."""
    outer = getattr(loader, "sampler", None)
    inner = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    # Lightning wraps samplers for several processes, keeping the user's in here.
    wrapped = [
        getattr(getattr(sampler, "dataset", None), "_sampler", None)
        for sampler in (outer, inner)
    ]
    for sampler in (outer, inner, *wrapped):
        indices: Any = getattr(sampler, "indices", None)
        # Not iterators: reading one would use it up.
        if hasattr(indices, "__len__") and not isinstance(indices, Mapping):
            with suppress(TypeError):  # not whole numbers: they mean something else
                numbers = indices.tolist() if hasattr(indices, "tolist") else indices
                return list(dict.fromkeys(operator.index(number) for number in numbers))
    return None


def samples(
    dataset: Any, seed: int | None, limited: int | None, among: list[int] | None = None
) -> Iterator[Any]:
    """Examples of a data set one by one; read them where it is `undisturbed`.

    Args:
        dataset: The data set. A stream is copied and read from its start.
        seed: Of the order; None for the order of the data set.
        limited: How many at most; None for all.
        among: The indices to choose from; None for all.

    Yields:
        The examples, none twice.

    Raises:
        ProbeError: If it is a stream that cannot be copied.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        try:
            stream = copy.deepcopy(dataset)
        except Exception as error:  # whatever the parts of a stream raise
            raise ProbeError(
                f"Probe.from_loader: the stream cannot be copied ({error}); reading it "
                "would consume it. Build the probe yourself: Probe(inputs, targets)."
            ) from error
        yield from stream
        return
    indices = range(len(dataset)) if among is None else among
    order: Any = range(len(indices))
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(indices), generator=generator).tolist()
    for position in islice(order, limited):
        yield dataset[indices[position]]


@contextmanager
def _own_generators_kept(dataset: Any) -> Iterator[None]:
    """Restore the generators that a data set or its transforms keep for themselves."""
    restore: list[Callable[[], Any]] = []
    waiting, seen = [dataset], set[int]()
    while waiting:
        if id(value := waiting.pop()) in seen:
            continue
        seen.add(id(value))
        if (undo := generator_state(value)) is not None:
            restore.append(undo)
        elif isinstance(value, dict | list | tuple):
            if len(value) <= _MOST_TRANSFORMS:
                waiting.extend(value.values() if isinstance(value, dict) else value)
        elif not isinstance(value, ModuleType | Tensor | type):
            waiting.extend(getattr(value, "__dict__", {}).values())
    try:
        yield
    finally:
        for undo in restore:
            undo()


@contextmanager
def _state_kept(dataset: Any) -> Iterator[None]:
    """Restore the attributes of a data set and of those it wraps, one level deep."""
    # The attributes themselves, and the dicts, lists, sets and deques among them.
    kept: list[tuple[Any, list[Any]]] = []
    waiting, seen = [dataset], set[int]()
    while waiting:
        if id(value := waiting.pop()) in seen:
            continue
        seen.add(id(value))
        attributes = getattr(value, "__dict__", None)
        if not isinstance(attributes, dict) or isinstance(value, ModuleType):
            continue
        kept.append((attributes, contents_of(attributes)))
        for name, part in attributes.items():
            if isinstance(part, dict | list | set | deque):
                kept.append((part, contents_of(part)))
            if name == "datasets" and isinstance(part, dict | list | tuple):
                waiting.extend(part.values() if isinstance(part, dict) else part)
            elif name in ("dataset", "datasets") or isinstance(part, Dataset):
                waiting.append(part)
    try:
        yield
    finally:
        known = seen.union(id(item) for _, contents in kept for item in contents)
        for container, contents in kept:
            for item in refill(container, contents):
                _close(item, known)


def _close(item: Any, known: set[int]) -> None:
    """Close a handle, or those in a container, that was not there before."""
    if id(item) in known or isinstance(item, ModuleType | type):
        return
    if isinstance(item, dict | list | tuple | set):
        for part in contents_of(item):
            if not isinstance(part, dict | list | tuple | set):
                _close(part, known)
    elif callable(close := getattr(item, "close", None)):
        with suppress(Exception):  # a handle in use cannot be closed; it is let go
            close()

"""Probe: the fixed examples a run is measured on, and how to draw them from data."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import default_collate

from ntk_callbacks._types import Inputs
from ntk_callbacks.drawing import indices_of, samples, undisturbed
from ntk_callbacks.errors import ProbeError
from ntk_callbacks.nested import as_targets, batch_size, leaves, map_tensors, parts

_INPUT_KEYS = ("x", "input", "inputs", "image", "images", "img", "features", "data")
_TARGET_KEYS = ("y", "target", "targets", "label", "labels")


@dataclass(frozen=True, eq=False)
class Probe:
    """Fixed inputs, and optionally targets, that every measurement of a run uses.

    A probe equals only itself; compare the `digest` of two to compare their examples.

    Args:
        inputs: A tensor `(n, ...)`, or a nested tuple, list or mapping of tensors with
            leading dimension n. A tuple becomes the positional arguments of the model,
            a mapping its keywords.
        targets: Class indices `(n,)`, or real targets `(n, ...)`; None if unknown.

    Raises:
        ProbeError: If there is no example, the tensors disagree about n, an array or a
            `PackedSequence` stands where a tensor should, or an input is NaN.
            Infinite inputs are allowed: attention masks use −∞.

    Example:
        >>> probe = Probe(torch.zeros(3, 2), torch.tensor([0, 1, 1]))
        >>> probe.n, probe.digest[:8]
        (3, 'c8dfc30e')
    """

    inputs: Inputs
    targets: Tensor | None = None

    def __post_init__(self) -> None:
        _refuse_arrays(self.inputs, self.targets)
        try:
            n = batch_size(self.inputs)
        except ValueError as error:
            raise ProbeError(f"Probe: {error}") from error
        if n == 0:
            raise ProbeError("Probe: there is no example; at least one is needed.")
        if self.targets is not None and self.targets.shape[:1] != (n,):
            count = len(self.targets) if self.targets.ndim else "no axis of"
            raise ProbeError(
                f"Probe: {n} inputs but {count} targets; give one target to each input."
            )
        for tensor in leaves(self.inputs):
            if tensor.is_floating_point() and tensor.isnan().any():
                raise ProbeError(
                    "Probe: the inputs hold NaN; every measurement on them would be "
                    "NaN. Clean them first."
                )

    @property
    def n(self) -> int:
        """Number of examples."""
        return batch_size(self.inputs)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the inputs and targets: values, shapes, dtypes, order and keys."""
        whole = (self.inputs, self.targets)
        layout = map_tensors(lambda tensor: (str(tensor.dtype), *tensor.shape), whole)
        digest = hashlib.sha256(repr(layout).encode())
        for tensor in leaves(whole):
            value = tensor.detach().cpu().contiguous()
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @classmethod
    def from_loader(
        cls, loader: Any, n: int, balanced: bool = False, seed: int | None = 0
    ) -> "Probe":
        """Draw n examples from a loader's data set.

        The loader is not iterated: neither it, its sampler nor any generator notices,
        and attributes of the data set (counters, open files) are put back. Examples
        go through the loader's own `collate_fn`. If its sampler has `indices`, as a
        `SubsetRandomSampler` has, they come from those.

        Of a mapping, an obvious key such as `x` or `image` is the input if no other
        tensor but the targets is in it; else all of those are keywords of the model.

        Args:
            loader: A `DataLoader`, or anything with a `dataset` (and `collate_fn`).
            n: Number of examples.
            balanced: Take equally many of each class (up to one more for some), the
                classes one after the other. Reads every example once.
            seed: Which examples; None takes the first n in the order of the data set,
                or of the sampler's `indices`. A data set without `len` always gives
                its first n.

        Returns:
            A probe on the CPU.

        Raises:
            ProbeError: If the data hold fewer than n examples (or, balanced, too few
                of a class), or a batch is neither `(x, y)`, a tensor, nor a mapping
                with an obvious input key.

        Example:
            >>> data = torch.utils.data.TensorDataset(torch.eye(4), torch.arange(4) % 2)
            >>> loader = torch.utils.data.DataLoader(data, batch_size=2, shuffle=True)
            >>> Probe.from_loader(loader, 4, balanced=True).targets
            tensor([0, 0, 1, 1])
        """
        if n < 1:
            raise ProbeError(f"Probe.from_loader: n must be at least 1, got {n}.")
        if not hasattr(loader, "dataset"):
            raise ProbeError(
                f"Probe.from_loader: a {type(loader).__name__} has no `dataset` to "
                "draw from. Build the probe yourself: Probe(inputs, targets)."
            )
        if getattr(loader, "batch_sampler", loader) is None:
            raise ProbeError(
                "Probe.from_loader: with batch_size=None the data set yields whole "
                "batches. Build the probe yourself: Probe(inputs, targets)."
            )
        collate = getattr(loader, "collate_fn", None) or default_collate
        # With a seed, so that random transforms give the same probe again.
        with undisturbed(loader.dataset, seed=seed or 0):
            limited = None if balanced else n
            found = samples(loader.dataset, seed, limited, indices_of(loader))
            if balanced:
                return cls._balanced(found, n, collate)
            drawn = list(islice(found, n))
            if len(drawn) < n:
                raise ProbeError(
                    f"Probe.from_loader: the data hold {len(drawn)} examples, fewer "
                    f"than the {n} asked for. Ask for at most {len(drawn)}."
                )
            return cls.from_batch(collate(drawn))

    @classmethod
    def _balanced(cls, found: Iterator[Any], n: int, collate: Any) -> "Probe":
        """Equal shares of the classes, each the first examples of its class."""
        by_class: dict[int, list[Any]] = {}
        for sample in found:
            target = cls.from_batch(collate([sample])).targets
            if target is None or target.is_floating_point() or target.numel() != 1:
                raise ProbeError(
                    "Probe.from_loader: balanced=True needs one class index for each "
                    "example. Draw with balanced=False."
                )
            kept = by_class.setdefault(int(target), [])
            if len(kept) < n:
                kept.append(sample)
        if not by_class:
            raise ProbeError("Probe.from_loader: the data set is empty.")
        share, rest = divmod(n, len(by_class))
        drawn: list[Any] = []
        for index, (label, kept) in enumerate(sorted(by_class.items())):
            count = share + (index < rest)
            if len(kept) < count:
                raise ProbeError(
                    f"Probe.from_loader: {n} balanced examples of {len(by_class)} "
                    f"classes need {count} of class {label}; the data hold "
                    f"{len(kept)}. Ask for fewer."
                )
            drawn += kept[:count]
        return cls.from_batch(collate(drawn))

    @classmethod
    def from_batch(cls, batch: Any) -> "Probe":
        """Split a batch as loaders give it into inputs and targets.

        Args:
            batch: `(x, y)`, a tensor, or a mapping with an obvious input key, as in
                `from_loader`.

        Returns:
            Its examples, where they are.

        Raises:
            ProbeError: If it is none of these.

        Example:
            >>> Probe.from_batch({"image": torch.eye(2), "label": torch.arange(2)}).n
            2
        """
        if isinstance(batch, Tensor | PackedSequence):
            return cls(batch)
        if isinstance(batch, Mapping):
            return cls._from_mapping(batch)
        if isinstance(batch, Sequence) and len(batch) == 1:
            return cls(batch[0])
        if isinstance(batch, Sequence) and len(batch) == 2:
            return cls(batch[0], as_targets(batch[1]))
        size = f" of {len(batch)}" if isinstance(batch, Sequence) else ""
        raise ProbeError(
            f"Probe: cannot tell inputs from targets in a batch that is a "
            f"{type(batch).__name__}{size}; expected (x, y), a tensor, or a mapping. "
            "Build the probe yourself: Probe(inputs, targets). A tuple of inputs "
            "becomes the positional arguments of the model: Probe((x, lengths), y)."
        )

    @classmethod
    def _from_mapping(cls, batch: Mapping[str, Any]) -> "Probe":
        targets = next((batch[key] for key in _TARGET_KEYS if key in batch), None)
        targets = as_targets(targets)
        inputs = {
            key: value
            for key, value in batch.items()
            if key not in _TARGET_KEYS
            and any(isinstance(part, Tensor | PackedSequence) for part in parts(value))
        }
        obvious = next((key for key in _INPUT_KEYS if key in batch), None)
        if obvious is not None and inputs.keys() <= {obvious}:
            return cls(batch[obvious], targets)
        if not inputs:
            raise ProbeError(
                f"Probe: no input among the batch keys {sorted(batch)}; expected one "
                f"of {', '.join(_INPUT_KEYS)}, or the keyword arguments of the model. "
                "Build the probe yourself: Probe(inputs, targets)."
            )
        return cls(inputs, targets)

    def to(self, device: torch.device | str) -> "Probe":
        """The same examples on another device."""
        targets = None if self.targets is None else self.targets.detach().to(device)
        inputs = map_tensors(lambda tensor: tensor.detach().to(device), self.inputs)
        return Probe(inputs, targets)

    def save(self, path: str | Path) -> None:
        """Write the probe to a file that `Probe.load` and `torch.load` can read."""
        probe = self.to("cpu")
        contents = {"inputs": probe.inputs, "targets": probe.targets}
        torch.save({**contents, "digest": self.digest}, path)

    @classmethod
    def load(cls, path: str | Path) -> "Probe":
        """Read a probe that `save` wrote.

        Args:
            path: The file.

        Returns:
            A probe on the CPU.

        Raises:
            ProbeError: If the file is missing, not a probe, or was altered.
        """
        if not Path(path).is_file():
            raise ProbeError(f"Probe.load: there is no file {str(path)!r}.")
        try:
            contents = torch.load(path, map_location="cpu", weights_only=True)
            probe = cls(contents["inputs"], contents["targets"])
            digest = contents["digest"]
        except Exception as error:  # whatever other contents raise
            raise ProbeError(
                f"Probe.load: {str(path)!r} is not a probe that was saved ({error!r})."
            ) from error
        if probe.digest != digest:
            raise ProbeError(
                f"Probe.load: {str(path)!r} was altered: its examples hash to "
                f"{probe.digest[:8]}, the file says {str(digest)[:8]}."
            )
        return probe


def _refuse_arrays(inputs: Any, targets: Any) -> None:
    """Tell what to do about arrays and lists of numbers, which are no tensors."""
    for part in parts(inputs):
        if not isinstance(part, Tensor) and getattr(part, "ndim", None):
            raise ProbeError(
                f"Probe: the inputs hold a {type(part).__name__}, not a tensor; pass "
                "torch.as_tensor(...) of it."
            )
    if isinstance(inputs, list | tuple) and all(
        isinstance(part, int | float) for part in parts(inputs)
    ):
        raise ProbeError(
            f"Probe: the inputs are a {type(inputs).__name__} of numbers, not a "
            "tensor; pass torch.as_tensor(inputs)."
        )
    if targets is not None and not isinstance(targets, Tensor):
        several = any(isinstance(part, Tensor) for part in parts(targets))
        packed = "one tensor (n, ...) of all of them, and a `loss_fn` that parts them"
        raise ProbeError(
            f"Probe: the targets are a {type(targets).__name__}, not a tensor; pass "
            f"{packed if several else 'torch.as_tensor(targets)'}."
        )

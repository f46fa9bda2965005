"""The file in which one monitor keeps its measurements, whatever is killed meanwhile.

`<folder>/<monitor>.jsonl` is only ever appended to: a line of conventions whenever a
run starts or goes on, and a line for each measurement. Its vectors and matrices lie in
a safetensors file of their own, complete before the line names it. So a kill can tear
the line that is being written, and nothing that was written before.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from safetensors.torch import save
from torch import Tensor

from ntk_callbacks.record import Measurement
from ntk_callbacks.reporting.history_rows import FORMAT

FOLDER = "ntk_history"
"""Name of the folder below that of a run."""

Earlier = Sequence[tuple[int, Mapping[str, float]]]


class HistoryFile:
    """Appends measurements; the file is open only while one is written.

    Args:
        folder: Where the files of a run lie; made when it is needed.
        name: Group of the tags of the monitor.
        matrices: Keep matrices too, not only scalars and vectors.

    Example:
        >>> import tempfile
        >>> from ntk_callbacks import load_history
        >>> folder = tempfile.mkdtemp()
        >>> file = HistoryFile(Path(folder, FOLDER), "ntk")
        >>> file.append(Measurement(0, {"ntk/trace": 2.0}), after=-1)
        >>> load_history(folder)["ntk/trace"].values
        array([2.])
    """

    def __init__(self, folder: Path, name: str, matrices: bool = False) -> None:
        self.folder = folder
        self.matrices = matrices
        self.conventions: dict[str, Any] | None = None
        """What the numbers mean; to be set before the first measurement."""
        self._stem = quote(name, safe="")
        self._name = name
        self._begun = False

    def append(
        self, measurement: Measurement, after: int, earlier: Earlier = ()
    ) -> None:
        """Add one measurement.

        Args:
            measurement: What to keep.
            after: Step of the previous measurement of this run, -1 if there is none:
                what the file holds of later steps is void, as when a run was resumed
                from a checkpoint before its end.
            earlier: (step, scalars) of measurements that a checkpoint remembers; kept
                where the file is new, as when a run goes on in another folder.

        Raises:
            OSError: If the disk is full or the folder cannot be written to.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self._stem}.jsonl"
        rows: list[dict[str, Any]] = []
        if not self._begun:
            header = {"format": FORMAT, "name": self._name}
            rows.append({**header, "conventions": self.conventions or {}})
            if not path.exists():
                rows += _remembered(earlier, after)
        row: dict[str, Any] = {"step": measurement.step, "after": after}
        if tensors := self._tensors(measurement):
            row |= {
                "tensors": self._write(tensors, measurement.step),
                **_names(tensors),
            }
        rows.append({**row, "scalars": _numbers(measurement.scalars)})
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        with path.open("a+b") as file:
            # The torn line of a process that was killed must not swallow this one.
            if file.tell() and not _ends_with_newline(file):
                text = f"\n{text}"
            file.write(text.encode())
        self._begun = True

    def _tensors(self, measurement: Measurement) -> dict[str, dict[str, Tensor]]:
        kinds = {"vectors": measurement.vectors}
        if self.matrices:
            kinds["matrices"] = measurement.matrices
        return {kind: tensors for kind, tensors in kinds.items() if tensors}

    def _write(self, kinds: dict[str, dict[str, Tensor]], step: int) -> str:
        tensors = {
            tag: _plain(tensor)
            for found in kinds.values()
            for tag, tensor in found.items()
        }
        contents = save(tensors)
        for version in itertools.count():  # of a step that was measured again
            suffix = f"-{version}" if version else ""
            name = f"{self._stem}-{step:08d}{suffix}.safetensors"
            try:
                with (self.folder / name).open("xb") as file:
                    file.write(contents)
            except FileExistsError:
                continue
            break
        return name


def _remembered(earlier: Earlier, after: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    previous = -1
    for step, scalars in earlier:
        if step <= after:
            row = {"step": step, "after": previous, "scalars": _numbers(scalars)}
            rows.append(row)
            previous = step
    return rows


def _names(kinds: dict[str, dict[str, Tensor]]) -> dict[str, list[str]]:
    return {kind: list(tensors) for kind, tensors in kinds.items()}


def _numbers(scalars: Mapping[str, float]) -> dict[str, float | str]:
    """JSON knows neither NaN nor infinity: they are written as texts."""
    return {
        tag: float(value) if math.isfinite(value) else str(float(value))
        for tag, value in scalars.items()
    }


def _plain(tensor: Tensor) -> Tensor:
    """On the CPU, of its own memory, in a dtype that NumPy knows."""
    tensor = tensor.detach().cpu()
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    return tensor.contiguous().clone()


def _ends_with_newline(file: Any) -> bool:
    file.seek(-1, 2)
    return bool(file.read(1) == b"\n")

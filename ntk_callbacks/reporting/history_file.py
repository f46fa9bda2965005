"""The file in which one monitor keeps its measurements, whatever is killed meanwhile.

`<folder>/<monitor>.jsonl` is only ever appended to: a line of conventions whenever a
run starts or goes on, and a line for each measurement. Its vectors and matrices lie in
a safetensors file of their own, complete before the line names it. So a kill can tear
the line that is being written, and nothing that was written before.

Where the file is not as this process left it, because a run goes on or a write failed,
the numbers that the monitor remembers and the file does not hold are added first.
"""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from safetensors.torch import save
from torch import Tensor

from ntk_callbacks.record import Measurement
from ntk_callbacks.reporting.history_rows import FORMAT, Row, read_rows

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
        self._name = name
        self._size: int | None = None  # after our last write, if that was complete
        self._shared = False

    @property
    def path(self) -> Path:
        """The file of lines."""
        return self.folder / f"{quote(self._name, safe='')}.jsonl"

    def append(
        self, measurement: Measurement, after: int, earlier: Earlier = ()
    ) -> None:
        """Add one measurement.

        Args:
            measurement: What to keep.
            after: Step of the previous measurement of this run, -1 if there is none:
                what the file holds of later steps is void, as when a run was resumed
                from a checkpoint before its end.
            earlier: (step, scalars) of all measurements before, as the monitor has them
                in memory. What the file lacks is added, as when a run goes on in
                another folder, or in that of another run, or the disk was full.

        Raises:
            OSError: If the disk is full or the folder cannot be written to.
            RuntimeError: If another process writes to the file, too.
        """
        with self._prepared(after, earlier) as rows:
            row: dict[str, Any] = {"step": measurement.step, "after": after}
            if tensors := self._tensors(measurement):
                row |= {
                    "tensors": self._write(tensors, measurement.step),
                    **_names(tensors),
                }
            self._add([*rows, {**row, "scalars": _numbers(measurement.scalars)}])

    def catch_up(self, measured: Earlier) -> None:
        """Add the numbers that could not be written when they were measured.

        Args:
            measured: (step, scalars) of all measurements of the run.

        Raises:
            OSError: As `append`.
            RuntimeError: As `append`.
        """
        with self._prepared(measured[-1][0] if measured else -1, measured) as rows:
            if rows:
                self._add(rows)

    @contextmanager
    def _prepared(self, after: int, earlier: Earlier) -> Iterator[list[dict[str, Any]]]:
        """What is to be written first; nothing, where the file is as we left it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            yield self._beginning(after, earlier)
        except Exception as error:
            self._size = None  # something may be missing: look again next time
            if isinstance(error, OSError) and error.filename is None:
                error.filename = str(self.folder)  # a full disk does not say which
            raise

    def _beginning(self, after: int, earlier: Earlier) -> list[dict[str, Any]]:
        size = self.path.stat().st_size if self.path.exists() else 0
        if size == self._size and not self._shared:
            return []
        self._shared |= bool(size) and self._size is not None
        if self._shared:
            raise RuntimeError(
                f"another process writes to {self.path.name} too; give each run a "
                "folder of its own"
            )
        header = {"format": FORMAT, "name": self._name}
        kept = read_rows(self.path).measured if size else []
        rows = _missing(kept, earlier, after)
        return [{**header, "conventions": self.conventions or {}}, *rows]

    def _add(self, rows: Iterable[dict[str, Any]]) -> None:
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        self._size = None
        with self.path.open("a+b") as file:
            # The torn line of a process that was killed must not swallow this one.
            if file.tell() and not _ends_with_newline(file):
                text = f"\n{text}"
            file.write(text.encode())
            file.flush()
            size = file.tell()
        self._size = size

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
            path = self.path.with_name(
                f"{self.path.stem}-{step:08d}{suffix}.safetensors"
            )
            try:
                file = path.open("xb")
            except FileExistsError:
                continue
            break
        try:
            with file:
                file.write(contents)
        except OSError:
            with suppress(OSError):
                path.unlink()  # a full disk has no room for what is of no use
            raise
        return path.name


def _missing(kept: Iterable[Row], earlier: Earlier, after: int) -> list[dict[str, Any]]:
    """What is remembered behind the last measurement that the file holds too."""
    known = {row.step: row.scalars for row in kept if row.step <= after}
    remembered = [(step, scalars) for step, scalars in earlier if step <= after]
    start = 0
    for index, (step, scalars) in enumerate(remembered):
        if step in known:
            if not _holds(known[step], scalars):
                break  # the file is that of another run
            start = index + 1
    rows: list[dict[str, Any]] = []
    # What was measured before there was a memory of it stays.
    previous = (
        remembered[start - 1][0]
        if start
        else min((s for s, _ in remembered), default=0) - 1
    )
    for step, scalars in remembered[start:]:
        row = {"step": step, "after": previous, "scalars": _numbers(scalars)}
        rows.append(row)
        previous = step
    return rows


def _holds(kept: Mapping[str, float], scalars: Mapping[str, float]) -> bool:
    """Whether a row has these numbers; it may have others too, such as times."""
    found = {tag: kept[tag] for tag in scalars if tag in kept}
    return _numbers(found) == _numbers(scalars)


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

"""What monitors kept of a run, as plain arrays."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from ntk_callbacks.reporting.history_file import FOLDER
from ntk_callbacks.reporting.history_rows import Row, read_rows


@dataclass(frozen=True, eq=False)
class Series:
    """One quantity of one run.

    Args:
        steps: Completed optimizer updates, increasing, (m,).
        values: Scalars as an array (m,); vectors and matrices, whose sizes may change
            from step to step, as a list of m arrays.
    """

    steps: NDArray[np.int64]
    values: Any


class RunHistory(Mapping[str, Series]):
    """The measurements of one run by tag; what `load_history` returns.

    Scalars are in memory; vectors and matrices are read when they are asked for.

    Attributes:
        folder: Where the files lie.
        conventions: Name of the monitor -> what its numbers mean: outputs, scaling,
            mode, dtype, digest of the probe, versions and seeds.
        scalars: Tags of single numbers.
        vectors: Tags of vectors, such as spectra.
        matrices: Tags of matrices; empty unless a monitor was asked to keep them.
    """

    def __init__(
        self,
        folder: Path,
        conventions: dict[str, dict[str, Any]],
        rows: list[Row],
    ) -> None:
        self.folder = folder
        self.conventions = conventions
        self._rows = rows
        self.scalars = _ordered(tag for row in rows for tag in row.scalars)
        self.vectors = _ordered(tag for row in rows for tag in row.vectors)
        self.matrices = _ordered(tag for row in rows for tag in row.matrices)

    def __getitem__(self, tag: str) -> Series:
        if tag in self.scalars:
            found = [(r.step, r.scalars[tag]) for r in self._rows if tag in r.scalars]
            return Series(_steps(found), np.array([value for _, value in found]))
        if tag in self.vectors or tag in self.matrices:
            kept = [
                (row.step, _tensor(row, tag))
                for row in self._rows
                if tag in row.vectors or tag in row.matrices
            ]
            return Series(_steps(kept), [value for _, value in kept])
        hint = (
            " Kernels are kept by NTKMonitor(options=NTKOptions(keep_kernels=True))."
            if tag.endswith("/kernel")
            else ""
        )
        raise KeyError(f"no measurement of {tag!r}; there are {', '.join(self)}.{hint}")

    def __contains__(self, tag: object) -> bool:
        return tag in (*self.scalars, *self.vectors, *self.matrices)

    def __iter__(self) -> Iterator[str]:
        return iter((*self.scalars, *self.vectors, *self.matrices))

    def __len__(self) -> int:
        return len(self.scalars) + len(self.vectors) + len(self.matrices)

    def intact(self) -> tuple["RunHistory", int]:
        """What can be read, where files are gone or damaged.

        Returns:
            A history without the vectors and matrices of measurements whose file cannot
            be read, and how many measurements these are.
        """
        rows = [
            row if _readable(row.file) else replace(row, vectors=(), matrices=())
            for row in self._rows
        ]
        lost = sum(new is not old for new, old in zip(rows, self._rows, strict=True))
        return RunHistory(self.folder, self.conventions, rows), lost

    def __repr__(self) -> str:
        steps = sorted({row.step for row in self._rows})
        return (
            f"RunHistory({str(self.folder)!r}: {len(self)} quantities, "
            f"steps {steps[0]} to {steps[-1]})"
        )


def load_history(run_dir: str | Path) -> RunHistory:
    """Read what the monitors of a run kept.

    A run that was killed is read up to its last complete measurement; one that was
    resumed gives the curves of an unbroken one.

    Args:
        run_dir: Folder of the run (for Lightning's loggers their `log_dir`), or the
            `ntk_history` in it.

    Returns:
        A mapping from tags to series of steps and values.

    Raises:
        FileNotFoundError: If there is no such folder, or none that monitors wrote.
        ValueError: If no measurement is complete, or a newer version wrote the files.

    Example:
        >>> import tempfile
        >>> from ntk_callbacks.record import Measurement
        >>> from ntk_callbacks.reporting.history_file import HistoryFile
        >>> folder = tempfile.mkdtemp()
        >>> file = HistoryFile(Path(folder, "ntk_history"), "ntk")
        >>> file.append(Measurement(0, {"ntk/trace": 2.0}), after=-1)
        >>> file.append(Measurement(10, {"ntk/trace": 3.5}), after=0)
        >>> history = load_history(folder)
        >>> history["ntk/trace"].steps, history["ntk/trace"].values
        (array([ 0, 10]), array([2. , 3.5]))
    """
    folder = _history_folder(Path(run_dir).expanduser())
    return history_of(folder, sorted(folder.glob("*.jsonl")))


def history_of(folder: Path, files: Iterable[Path]) -> RunHistory:
    """Read what some monitors of a run kept.

    Args:
        folder: Where the files lie.
        files: One for each monitor.

    Returns:
        As `load_history`.

    Raises:
        ValueError: As `load_history`.
    """
    conventions: dict[str, dict[str, Any]] = {}
    rows: list[Row] = []
    for path in files:
        found = read_rows(path)
        rows += found.measured
        if found.conventions is not None:
            conventions[unquote(path.stem)] = found.conventions
    if not rows:
        raise ValueError(
            f"load_history: no complete measurement in {str(folder)!r}; the run ended "
            "before its first one was written."
        )
    rows.sort(key=lambda row: row.step)
    return RunHistory(folder, conventions, rows)


def history_folders(path: str | Path) -> list[Path]:
    """Folders of the runs at or below a path, in the order a reader expects.

    Args:
        path: A run, its `ntk_history`, or a folder of runs such as that of a sweep.

    Returns:
        Folders that `load_history` reads; empty if there are none.
    """
    path = Path(path)
    if path.name == FOLDER and path.is_dir():
        return [path.parent]
    if (path / FOLDER).is_dir():
        return [path]
    below = (found.parent for found in path.rglob(FOLDER) if found.is_dir())
    return sorted(below, key=_as_read)


def _as_read(path: Path) -> list[tuple[int, str]]:
    """Orders width32 before width128."""
    parts = re.split(r"(\d+)", str(path))
    return [(int(part), "") if part.isdigit() else (0, part) for part in parts]


def _history_folder(path: Path) -> Path:
    if not path.is_dir():
        raise FileNotFoundError(f"load_history: there is no folder {str(path)!r}.")
    for folder in (path / FOLDER, path):
        if _has_lines(folder):
            return folder
    runs = [found for found in history_folders(path) if _has_lines(found / FOLDER)]
    if runs:
        hint = f"There are some below it: {', '.join(map(str, runs[:5]))}."
    elif FOLDER in (path.name, *(found.name for found in path.iterdir())):
        hint = "It is empty: the run ended before its first measurement was written."
    else:
        hint = "Monitors write one beside the logger, or where history=<folder> says."
    raise FileNotFoundError(
        f"load_history: {str(path)!r} holds no {FOLDER} with measurements. {hint}"
    )


def _has_lines(folder: Path) -> bool:
    return any(folder.glob("*.jsonl"))


def _tensor(row: Row, tag: str) -> NDArray[Any]:
    assert row.file is not None
    if not row.file.is_file():
        raise FileNotFoundError(
            f"load_history: {str(row.file)!r}, which holds {tag} of step {row.step}, "
            "is gone. Copy the whole folder of a history."
        )
    try:
        array: NDArray[Any] = load_file(row.file)[tag]
    except SafetensorError as error:
        raise ValueError(
            f"load_history: {str(row.file)!r}, which holds {tag} of step {row.step}, "
            f"is damaged ({error}). Copy the whole folder of a history."
        ) from error
    return array


def _readable(file: Path | None) -> bool:
    if file is None:
        return True
    try:
        with safe_open(file, framework="np"):  # reads where tensors begin and end
            return True
    except (OSError, SafetensorError):
        return False


def _steps(found: list[tuple[int, Any]]) -> NDArray[np.int64]:
    return np.array([step for step, _ in found], dtype=np.int64)


def _ordered(tags: Iterator[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(tags))

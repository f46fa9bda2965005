"""The lines of a history file, and which of them count."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1
"""Version of the layout; a reader refuses newer ones."""


@dataclass(frozen=True, eq=False)
class Row:
    """One measurement.

    Args:
        step: Completed optimizer updates.
        scalars: Tag -> number.
        file: Holds the tensors; None if there are none.
        vectors: Tags of the vectors in it.
        matrices: Tags of the matrices in it.
    """

    step: int
    scalars: dict[str, float]
    file: Path | None
    vectors: tuple[str, ...]
    matrices: tuple[str, ...]


@dataclass(eq=False)
class Rows:
    """What one file says.

    Args:
        measured: Measurements that no later line made void, by increasing step.
        conventions: Those of the last run that wrote here; None if none said any.
    """

    measured: list[Row] = field(default_factory=list)
    conventions: dict[str, Any] | None = None


def read_rows(path: Path) -> Rows:
    """Read a history file up to its last complete line.

    Args:
        path: The file; what a killed process left of a line, and lines that no monitor
            wrote, are passed over.

    Returns:
        Its measurements and conventions.

    Raises:
        ValueError: If a newer version wrote the file.
    """
    found = Rows()
    for line in path.read_bytes().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # torn: its process was killed while it wrote
        if not isinstance(entry, dict):
            continue
        if isinstance(version := entry.get("format"), int):
            if version > FORMAT:
                raise ValueError(
                    f"load_history: {str(path)!r} was written in format {version}; "
                    f"this version reads up to {FORMAT}. Update ntk-callbacks."
                )
            found.conventions = entry.get("conventions", {})
            continue
        try:
            row, after = _row(entry, path.parent), int(entry["after"])
        except (AttributeError, KeyError, TypeError, ValueError):
            continue  # nothing that a monitor wrote
        while found.measured and found.measured[-1].step > after:
            found.measured.pop()
        found.measured.append(row)
    return found


def _row(entry: dict[str, Any], folder: Path) -> Row:
    return Row(
        step=int(entry["step"]),
        scalars={tag: float(value) for tag, value in entry["scalars"].items()},
        file=folder / entry["tensors"] if "tensors" in entry else None,
        vectors=tuple(entry.get("vectors", ())),
        matrices=tuple(entry.get("matrices", ())),
    )

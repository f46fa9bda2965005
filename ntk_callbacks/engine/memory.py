"""How much memory a computation may take, and the blocks that keep within it."""

import operator
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ntk_callbacks.errors import MemoryBudgetError

_UNITS = {
    **{"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
    **{"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40},
}


def memory_bytes(budget: int | str | None, device: torch.device) -> int:
    """A memory budget in bytes.

    Args:
        budget: A whole number of bytes, a text such as `"2GiB"` or `"500 MB"`, or None
            for a quarter of what the device has free.
        device: Where the computation runs.

    Returns:
        A positive number of bytes.

    Raises:
        ValueError: If the budget is not understood or not positive.

    Example:
        >>> memory_bytes("1.5GiB", torch.device("cpu"))
        1610612736
    """
    if budget is None:
        return max(_free_bytes(device) // 4, 1)
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", budget)
        unit = _UNITS.get(match[2]) if match else None
        size = int(float(match[1]) * unit) if match and unit else None
    else:
        size = _whole(budget)
    if size is None:
        raise ValueError(
            f"memory_budget={budget!r} is not understood; expected a whole number of "
            "bytes or a text such as '2GiB' with one of the units "
            f"{', '.join(_UNITS)[2:]}."
        )
    if size <= 0:
        raise ValueError(f"memory_budget must be positive, got {size}.")
    return size


def _whole(value: Any) -> int | None:
    """The integer that any integer type stands for; None for anything else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        return int(free + reserved - torch.cuda.memory_allocated(device))
    if device.type == "mps":
        used = torch.mps.driver_allocated_memory()
        return int(torch.mps.recommended_max_memory() - used)
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        if match:
            return int(match[1]) * 1024
    return 4 * 2**30  # Not Linux, and no portable way to ask.


@dataclass(frozen=True)
class Passes:
    """How a Jacobian is cut so that it fits into memory.

    Args:
        columns: For each pass over the examples, the columns of J that it keeps:
            parameter name -> slice of the flattened parameter.
        chunk: Examples differentiated in one call.
    """

    columns: list[dict[str, slice]]
    chunk: int


def passes(
    sizes: dict[str, int],
    rows: int,
    c: int,
    itemsize: int,
    *,
    activations: int,
    budget: int,
) -> Passes:
    """Cut a Jacobian into blocks of columns that need at most `budget` bytes.

    Half of the budget holds a block (all rows, some columns), half the differentiation
    of one chunk of examples. Every pass differentiates again, so the number of passes,
    the bytes of J over half of the budget, is what a small budget costs in time.

    Args:
        sizes: Number of entries of each parameter.
        rows: Rows of J that are held at once, those of both sides together.
        c: Outputs of one example.
        itemsize: Bytes of a number.
        activations: Bytes that the graph of one example holds.
        budget: Bytes.

    Returns:
        The fewest passes that fit.

    Raises:
        MemoryBudgetError: If one column, or the Jacobian of one example for the largest
            parameter, does not fit; says how much is needed.
    """
    half = budget // 2
    largest = max(sizes.values())

    def chunk_bytes(entries: int) -> int:
        return c * itemsize * entries + activations * (c + 1)

    width = half // (rows * itemsize)
    if width < 1 or chunk_bytes(largest) > half:
        needed = 2 * max(rows * itemsize, chunk_bytes(largest))
        raise MemoryBudgetError(
            f"the kernel needs at least {needed / 2**20:.3g} MiB of working memory "
            f"({rows} rows, {c} outputs, the largest parameter with {largest} "
            f"entries), the budget is {budget / 2**20:.3g} MiB. Raise "
            '`memory_budget`, select fewer parameters, or measure outputs="pseudo".'
        )
    columns: list[dict[str, slice]] = [{}]
    free = width
    for name, size in sizes.items():
        start = 0
        while start < size:
            if not free:
                columns.append({})
                free = width
            stop = min(size, start + free)
            columns[-1][name] = slice(start, stop)
            free -= stop - start
            start = stop
    widest = max(sum(sizes[name] for name in part) for part in columns)
    return Passes(columns, max(1, half // chunk_bytes(widest)))

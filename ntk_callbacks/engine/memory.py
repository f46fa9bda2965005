"""How much memory a computation may take, and the blocks that keep within it."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from ntk_callbacks.errors import MemoryBudgetError

_UNITS = {
    **{"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
    **{"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40},
}


def memory_bytes(budget: int | str | None, device: torch.device) -> int:
    """A memory budget in bytes.

    Args:
        budget: Bytes, a text such as `"2GiB"` or `"500 MB"`, or None for a quarter of
            what the device has free.
        device: Where the computation runs.

    Returns:
        A positive number of bytes.

    Raises:
        ValueError: If the text is not understood or the number is not positive.

    Example:
        >>> memory_bytes("1.5GiB", torch.device("cpu"))
        1610612736
    """
    if budget is None:
        return max(_free_bytes(device) // 4, 1)
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", budget)
        if match is None or match[2] not in _UNITS:
            raise ValueError(
                f"memory_budget={budget!r} is not understood; expected bytes or a text "
                f"such as '2GiB' with one of the units {', '.join(_UNITS)[2:]}."
            )
        budget = int(float(match[1]) * _UNITS[match[2]])
    if budget <= 0:
        raise ValueError(f"memory_budget must be positive, got {budget}.")
    return budget


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
class Blocks:
    """Which parameters, and how many examples, are held in memory together.

    Args:
        parameters: Names in groups; the Jacobian of one group is held at a time.
        examples: Rows of one block of the kernel, in examples.
        chunk: Examples differentiated in one call.
    """

    parameters: list[list[str]]
    examples: int
    chunk: int


def blocks(
    sizes: dict[str, int],
    n: int,
    c: int,
    itemsize: int,
    *,
    both: bool,
    activations: int,
    budget: int,
) -> Blocks:
    """Split a kernel computation so that it needs at most `budget` bytes.

    Half of the budget holds Jacobian blocks (n·c rows by the parameters of one group),
    half the differentiation of one chunk. If not even one parameter of all examples
    fits, the examples are split too, and blocks of rows are computed pair by pair.

    Args:
        sizes: Number of entries of each parameter.
        n: Examples of the larger side.
        c: Outputs of one example.
        itemsize: Bytes of a number.
        both: Whether two Jacobian blocks are needed at once (a cross kernel).
        activations: Bytes that the graph of one example holds.
        budget: Bytes.

    Returns:
        The largest blocks that fit.

    Raises:
        MemoryBudgetError: If the Jacobian of one example for the largest parameter does
            not fit; says how much is needed.
    """
    half = budget // 2
    row = c * itemsize  # bytes of one example and one parameter entry
    largest = max(sizes.values())
    sides = 2 if both else 1
    count = n
    if sides * n * row * largest > half:
        sides = 2  # blocks of rows are compared in pairs
        count = half // (sides * row * largest)
    per_example = row * largest + activations * (c + 1)
    if count < 1 or per_example > half:
        needed = 2 * max(2 * row * largest, per_example)
        raise MemoryBudgetError(
            f"the kernel needs at least {needed / 2**20:.3g} MiB of working memory "
            f"(one example, {c} outputs, the largest parameter with {largest} "
            f"entries), the budget is {budget / 2**20:.3g} MiB. Raise "
            '`memory_budget`, select fewer parameters, or measure outputs="pseudo".'
        )
    groups: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        cost = sides * count * row * size
        if groups[-1] and held + cost > half:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += cost
    widest = max(sum(sizes[name] for name in group) for group in groups)
    chunk = half // (row * widest + activations * (c + 1))
    return Blocks(groups, count, max(1, min(count, chunk)))

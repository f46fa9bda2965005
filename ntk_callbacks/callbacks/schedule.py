"""When a monitor measures: predicates on completed optimizer updates and epochs.

Whatever the schedule, a monitor also measures step 0 and the last step of a run.
"""

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, cast

StepRule: TypeAlias = Callable[[int], bool]


@dataclass(frozen=True)
class Schedule:
    """Which steps, and which ends of epochs, are measured.

    Args:
        text: How the schedule is written, for messages and checkpoints.
        step_rule: `step -> bool`, step ≥ 1 counting completed optimizer updates.
        epoch_rule: `epoch -> bool`, epoch ≥ 1 counting completed epochs.
    """

    text: str
    step_rule: StepRule
    epoch_rule: StepRule

    def due(self, step: int, finished_epoch: int | None = None) -> bool:
        """Whether to measure after `step` updates, which may have ended an epoch."""
        if finished_epoch is not None and self.epoch_rule(finished_epoch):
            return True
        return bool(self.step_rule(step))


def every(n: int, unit: str = "steps") -> Schedule:
    """Every n optimizer updates, or at the end of every n-th epoch.

    Args:
        n: A whole number of at least 1, of any integer type.
        unit: `"steps"` or `"epochs"`.

    Returns:
        A schedule.

    Raises:
        ValueError: If n is not such a number or the unit is unknown.

    Example:
        >>> [step for step in range(1, 9) if every(3).due(step)]
        [3, 6]
    """
    n = _count("every: n", n)
    if unit == "steps":
        return Schedule(f"{n} steps", partial(_multiple, n), _never)
    if unit == "epochs":
        return Schedule(f"{n} epochs", _never, partial(_multiple, n))
    raise ValueError(f"every: unit={unit!r}; expected 'steps' or 'epochs'.")


def log_spaced(per_decade: int = 5) -> Schedule:
    """Evenly spaced in log(step): dense early, where kernels move fastest.

    Args:
        per_decade: Measurements between 10^k and 10^(k+1), at least 1.

    Returns:
        A schedule that measures the steps 10^(i/per_decade), i = 0, 1, …, rounded.

    Raises:
        ValueError: If `per_decade` is not a whole number of at least 1.

    Example:
        >>> [step for step in range(1, 101) if log_spaced(3).due(step)]
        [1, 2, 5, 10, 22, 46, 100]
    """
    per_decade = _count("log_spaced: per_decade", per_decade)
    return Schedule(f"{per_decade} per decade", partial(_on_grid, per_decade), _never)


def at(*steps: int) -> Schedule:
    """Exactly the given optimizer updates.

    Args:
        *steps: Completed updates, in any order, of any integer type.

    Returns:
        A schedule.

    Raises:
        ValueError: If no step is given, or one that is no whole number of at least 0.

    Example:
        >>> [step for step in range(1, 100) if at(10, 50).due(step)]
        [10, 50]
    """
    chosen = {-1 if (n := _whole(step)) is None else n for step in steps}
    if min(chosen, default=-1) < 0:
        raise ValueError(
            "at: expected whole numbers that are not negative, as in at(1, 10, 100), "
            f"got at{steps!r}."
        )
    text = "at " + " ".join(str(step) for step in sorted(chosen))
    return Schedule(text, frozenset(chosen).__contains__, _never)


def as_schedule(value: int | str | Schedule | StepRule) -> Schedule:
    """A schedule from what `every=` of a monitor takes.

    Args:
        value: A schedule; an int n (every n steps); `"epoch"`, `"3 epochs"`,
            `"100 steps"`, `"5 per decade"`, `"at 1 10 100"`; or a function
            `step -> bool`.

    Returns:
        A schedule.

    Raises:
        ValueError: If the value is not understood.

    Example:
        >>> as_schedule("epoch").text
        '1 epochs'
    """
    if isinstance(value, Schedule):
        return value
    if isinstance(value, bool) or _whole(value) is not None:
        return every(cast("int", value))  # which refuses a flag
    if callable(value):
        name = getattr(value, "__qualname__", type(value).__name__)
        return Schedule(name, value, _never)
    text = value.strip().lower() if isinstance(value, str) else ""
    if text.isdecimal():
        return every(int(text))
    if match := re.fullmatch(r"(?:(\d+) )?(step|epoch)s?", text):
        return every(int(match[1] or 1), f"{match[2]}s")
    if match := re.fullmatch(r"(\d+) per decade", text):
        return log_spaced(int(match[1]))
    if re.fullmatch(r"at( \d+)+", text):
        return at(*(int(step) for step in text.split()[1:]))
    raise ValueError(
        f"every={value!r} is not understood; expected a number of steps, 'epoch', "
        "'3 epochs', '100 steps', '5 per decade', 'at 1 10 100', or a function "
        "step -> bool."
    )


def _whole(value: Any) -> int | None:
    """The integer that any integer type stands for; None for anything else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _count(argument: str, value: object) -> int:
    n = _whole(value)
    if n is None or n < 1:
        raise ValueError(
            f"{argument} must be a whole number of at least 1, got {value!r}."
        )
    return n


def _never(_count: int) -> bool:
    return False


def _multiple(n: int, count: int) -> bool:
    return count % n == 0


def _on_grid(per_decade: int, step: int) -> bool:
    """Whether step is 10^(i/per_decade) rounded, for some i ≥ 0."""
    if step < 1:
        return False
    near = math.floor(per_decade * math.log10(step))
    return any(
        round(10 ** (i / per_decade)) == step for i in range(max(near - 1, 0), near + 3)
    )

"""When a monitor measures: at which updates, ends of epochs and events.

Whatever the schedule, a monitor also measures step 0 and the last step of a run.
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, ClassVar, Protocol, TypeAlias

StepRule: TypeAlias = Callable[[int], bool]


class Event(Protocol):
    """Something that an update may bring about.

    What an event remembers is a dict of numbers, kept by whoever asks, so that it can
    travel in checkpoints; it is empty at the start of a run.
    """

    @property
    def text(self) -> str:
        """How the event is written, for schedules and checkpoints."""

    needs_loss: ClassVar[bool]
    """Whether the loss must be read, which waits for an accelerator."""

    def happens(
        self, memory: dict[str, Any], loss: float, rates: Sequence[float]
    ) -> bool:
        """Whether it happens at an update, with the memory brought up to date.

        Args:
            memory: What the event remembers, changed in place.
            loss: Loss of the batch; NaN where it is not known.
            rates: Learning rate of every parameter group.
        """


@dataclass(frozen=True)
class Schedule:
    """Which steps, ends of epochs and events are measured, and at most how much.

    Args:
        text: How the schedule is written, for messages and checkpoints.
        step_rule: `step -> bool`, step ≥ 1 counting completed optimizer updates.
        epoch_rule: `epoch -> bool`, epoch ≥ 1 counting completed epochs.
        events: Updates at which one of these happens are measured too.
        max_overhead: Largest share of the time of training that measuring may take;
            None for no limit.
    """

    text: str
    step_rule: StepRule
    epoch_rule: StepRule
    events: tuple[Event, ...] = ()
    max_overhead: float | None = None

    def due(self, step: int, finished_epoch: int | None = None) -> bool:
        """Whether to measure after `step` updates, which may have ended an epoch.

        Events and the limit on time are for `When`, which knows of them.

        Args:
            step: Completed updates.
            finished_epoch: Completed epochs, if the last update ended one.

        Returns:
            Whether a rule for steps or epochs says so.
        """
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
    n = count_of("every: n", n)
    if unit == "steps":
        return Schedule(f"{n} steps", partial(_multiple, n), never)
    if unit == "epochs":
        return Schedule(f"{n} epochs", never, partial(_multiple, n))
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
    per_decade = count_of("log_spaced: per_decade", per_decade)
    return Schedule(f"{per_decade} per decade", partial(_on_grid, per_decade), never)


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
    chosen = {-1 if (n := whole_number(step)) is None else n for step in steps}
    if min(chosen, default=-1) < 0:
        raise ValueError(
            "at: expected whole numbers that are not negative, as in at(1, 10, 100), "
            f"got at{steps!r}."
        )
    text = "at " + " ".join(str(step) for step in sorted(chosen))
    return Schedule(text, frozenset(chosen).__contains__, never)


def whole_number(value: Any) -> int | None:
    """The integer that any integer type stands for; None for anything else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def count_of(argument: str, value: object) -> int:
    """A whole number of at least 1, or an error that names the argument."""
    n = whole_number(value)
    if n is None or n < 1:
        raise ValueError(
            f"{argument} must be a whole number of at least 1, got {value!r}."
        )
    return n


def positive_number(argument: str, value: object, above: float = 0.0) -> float:
    """A finite number above a bound, or an error that names the argument."""
    number = math.nan if isinstance(value, bool | str) else value
    if isinstance(number, Real) and above < float(number) < math.inf:
        return float(number)
    raise ValueError(f"{argument}={value!r}; expected a number above {above:g}.")


def never(_count: int) -> bool:
    """The rule of what no count brings about."""
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

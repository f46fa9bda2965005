"""What `every=` of a monitor takes: one schedule or several, as objects or text."""

import re
from dataclasses import replace
from functools import partial
from typing import TypeAlias, cast

from ntk_callbacks.callbacks.events import learning_rate_change, loss_spike
from ntk_callbacks.callbacks.schedule import (
    Schedule,
    StepRule,
    at,
    every,
    log_spaced,
    never,
    positive_number,
    whole_number,
)

Every: TypeAlias = int | str | Schedule | StepRule

_LIMIT = ", max_overhead="  # between the text of a schedule and the limit on it


def as_schedule(value: Every) -> Schedule:
    """A schedule from what `every=` of a monitor takes.

    Args:
        value: A schedule; an int n (every n steps); `"epoch"`, `"3 epochs"`,
            `"100 steps"`, `"5 per decade"`, `"at 1 10 100"`, `"loss spike"`,
            `"learning-rate change"`, several of these with commas between them, perhaps
            with `"max_overhead=0.05"` at the end; or a function `step -> bool`.

    Returns:
        A schedule.

    Raises:
        ValueError: If the value is not understood.

    Example:
        >>> as_schedule("epoch").text
        '1 epochs'
        >>> as_schedule("epoch, loss spike, max_overhead=0.05").max_overhead
        0.05
    """
    if isinstance(value, Schedule):
        return value
    if isinstance(value, bool) or whole_number(value) is not None:
        return every(cast("int", value))  # which refuses a flag
    if callable(value):
        name = getattr(value, "__qualname__", type(value).__name__)
        return Schedule(name, value, never)
    text = value.strip().lower() if isinstance(value, str) else ""
    *parts, last = (part.strip() for part in text.split(","))
    if parts and (match := re.fullmatch(r"max_overhead ?= ?(\d*\.?\d+)", last)):
        return capped(", ".join(parts), float(match[1]))
    if parts:
        if any(part.isdecimal() for part in (*parts, last)):  # not "at 1, 10"
            raise ValueError(
                f"every={value!r}: a number among several schedules is not clear; "
                "expected '10 steps', or 'at 1 10 100' without commas."
            )
        return either(*parts, last)
    if text.isdecimal():
        return every(int(text))
    if match := re.fullmatch(r"(?:(\d+) )?(step|epoch)s?", text):
        return every(int(match[1] or 1), f"{match[2]}s")
    if match := re.fullmatch(r"(\d+) per decade", text):
        return log_spaced(int(match[1]))
    if re.fullmatch(r"at( \d+)+", text):
        return at(*(int(step) for step in text.split()[1:]))
    if re.fullmatch(r"loss[ -]spikes?", text):
        return loss_spike()
    if re.fullmatch(r"learning[ -]rate[ -]changes?", text):
        return learning_rate_change()
    raise ValueError(
        f"every={value!r} is not understood; expected a number of steps, 'epoch', "
        "'3 epochs', '100 steps', '5 per decade', 'at 1 10 100', 'loss spike', "
        "'learning-rate change', several with commas and perhaps 'max_overhead=0.05' "
        "at the end, or a function step -> bool."
    )


def either(*schedules: Every) -> Schedule:
    """Whenever one of several schedules is due.

    Args:
        *schedules: Whatever `every=` of a monitor takes.

    Returns:
        A schedule; the smallest of the limits on overhead holds for all of it.

    Raises:
        ValueError: If there is none, or one is not understood.

    Example:
        >>> both = either("100 steps", at(1, 10))
        >>> [step for step in range(1, 250) if both.due(step)]
        [1, 10, 100, 200]
    """
    parts = [as_schedule(schedule) for schedule in schedules]
    if not parts:
        raise ValueError("either: expected at least one schedule.")
    limits = [part.max_overhead for part in parts if part.max_overhead is not None]
    limit = min(limits, default=None)
    texts = [part.text.split(_LIMIT)[0] for part in parts]
    events = tuple(dict.fromkeys(event for part in parts for event in part.events))
    found = Schedule(
        ", ".join(dict.fromkeys(texts)),
        partial(_any, tuple(part.step_rule for part in parts)),
        partial(_any, tuple(part.epoch_rule for part in parts)),
        events,
    )
    return found if limit is None else capped(found, limit)


def capped(schedule: Every, max_overhead: float = 0.05) -> Schedule:
    """A schedule, thinned so that measuring takes at most a share of training.

    A measurement that is due is left out if with it (taking as long as the last one)
    all that this monitor has measured in this fit would take longer than `max_overhead`
    times the rest of the fit so far. Step 0 and the last step are measured all the
    same, and count. Which steps are left out depends on the clock: two runs differ.

    Args:
        schedule: Whatever `every=` of a monitor takes.
        max_overhead: Share of the time, 0.05 for 5 %.

    Returns:
        A schedule.

    Raises:
        ValueError: If the share is not positive, or the schedule is not understood.

    Example:
        >>> capped("epoch", 0.05).text
        '1 epochs, max_overhead=0.05'
    """
    share = positive_number("capped: max_overhead", max_overhead)
    part = as_schedule(schedule)
    bare = part.text.split(_LIMIT)[0]
    return replace(
        part,
        text=f"{bare}{_LIMIT}{share:g}",
        max_overhead=share,
    )


def _any(rules: tuple[StepRule, ...], count: int) -> bool:
    return any(rule(count) for rule in rules)

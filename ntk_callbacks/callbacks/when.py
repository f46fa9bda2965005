"""One monitor's decision to measure: its schedule, events, and share of the time."""

import math
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ntk_callbacks.callbacks.namespaces import rank_zero_info
from ntk_callbacks.callbacks.schedule import Event, Schedule

_LONG = 10.0  # seconds of a measurement that are worth a word


class When:
    """Says at each update whether to measure, once and for all.

    Args:
        schedule: Which steps, epochs and events; at most how much of the time.
        who: Named in messages.
    """

    def __init__(self, schedule: Schedule, who: str) -> None:
        self.schedule = schedule
        self.who = who
        self.restart()

    def restart(self) -> None:
        """Another run begins, which knows nothing of the last."""
        self._memories: dict[str, dict[str, Any]] = {}
        self._losses: dict[int, Tensor] = {}
        self._seen = self._event = -1
        self._decided: dict[tuple[int, bool], bool] = {}
        self._said = False
        self.start_clock()

    def start_clock(self) -> None:
        """A fit begins; overhead is a share of its time."""
        self._start = time.perf_counter()
        self._spent = self._last = self._prepared = 0.0

    def prepared(self, seconds: float) -> None:
        """So much of the next measurement was done before it was due."""
        self._prepared += seconds

    def spent(self, seconds: float) -> None:
        """A measurement took this long, besides what was prepared."""
        self._last = self._prepared + seconds
        self._spent += self._last
        self._prepared = 0.0
        if self._last > _LONG and self.schedule.max_overhead is None:
            self._say(
                "Fewer examples or outputs make it cheaper; max_overhead=0.05 in "
                "every=… leaves some out, so that all together take at most 5 % of the "
                "time of training."
            )

    def note_loss(self, step: int, loss: Tensor) -> None:
        """A loss is about to be differentiated.

        Args:
            step: The update that it is for, counted from 1; losses accumulate.
            loss: One number.
        """
        if not any(event.needs_loss for event in self.schedule.events):
            return
        part = loss.detach()
        self._losses = {
            step: self._losses[step] + part if step in self._losses else part
        }

    def note_update(self, step: int, rates: Sequence[float]) -> None:
        """The gradients of an update are complete, which decides whether events happen.

        Args:
            step: The update that is about to be made, counted from 1. Of several
                optimizers that make it, the first decides.
            rates: Learning rate of every parameter group.
        """
        if step <= self._seen:
            return
        self._seen = step
        loss = self._losses.get(step)
        known = [e for e in self.schedule.events if not (e.needs_loss and loss is None)]
        self._happen(step, known, math.nan if loss is None else float(loss), rates)

    def note_late_loss(self, step: int, loss: float) -> bool:
        """The loss of an update becomes known once it is made.

        Args:
            step: The update that was made last, whose loss was not noted before it.
            loss: One number.

        Returns:
            Whether an event happens, so that `due` may have another answer now.
        """
        asking = [event for event in self.schedule.events if event.needs_loss]
        happens = self._happen(step, asking, loss, [])
        if happens:
            self._decided.clear()
        return happens

    def _happen(
        self, step: int, events: Sequence[Event], loss: float, rates: Sequence[float]
    ) -> bool:
        happened = [
            event.happens(self._memories.setdefault(event.text, {}), loss, rates)
            for event in events
        ]
        if any(happened):
            self._event = step
        return any(happened)

    def due(self, step: int, finished_epoch: int | None = None) -> bool:
        """Whether to measure after `step` updates, which may have ended an epoch.

        Args:
            step: Completed updates.
            finished_epoch: Completed epochs, if the last update ended one.

        Returns:
            The same when asked again, although time goes by.
        """
        key = step, finished_epoch is not None
        if key not in self._decided:
            due = self._event == step or self.schedule.due(step, finished_epoch)
            self._decided = {k: v for k, v in self._decided.items() if k[0] == step}
            self._decided[key] = due and self._affordable()
        return self._decided[key]

    def _affordable(self) -> bool:
        limit = self.schedule.max_overhead
        if limit is None:
            return True
        training = time.perf_counter() - self._start - self._spent
        affordable = self._spent + self._last <= limit * training
        if not affordable:
            self._say(
                "Some that are due are left out, so that all together take at most "
                f"{limit:.3g} of the time of training."
            )
        return affordable

    def _say(self, what: str) -> None:
        if not self._said:
            self._said = True
            rank_zero_info(
                f"{self.who}: a measurement takes {self._last:.2g} s. {what}"
            )

    def state_dict(self) -> dict[str, Any]:
        """What the events remember, and the last update at which one happened."""
        memories = {text: dict(memory) for text, memory in self._memories.items()}
        return {**memories, "at": self._event}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        memories = dict(state)
        self._event = memories.pop("at", -1)  # earlier versions did not keep it
        self._memories = {text: dict(memory) for text, memory in memories.items()}

"""How far a monitor is in its run, and what a checkpoint keeps of that."""

from typing import Any

from ntk_callbacks.instruments.instrument import Instrument


class Progress:
    """Counts updates, and knows the way back from a measurement that should not count.

    Args:
        instrument: Its state is that of the run, too.

    Attributes:
        history: (step, scalars) of every measurement.
        step: Completed updates.
        measured: The step that was measured last, -1 if there is none.
        previous: The one before that.
        owed: Whether a measurement on schedule was interrupted.
        before: The state before a measurement that was interrupted, or before a final
            one off schedule: what a checkpoint keeps, so that a resumed run draws the
            curves of an unbroken one.
    """

    def __init__(self, instrument: Instrument) -> None:
        self.instrument = instrument
        self.history: list[tuple[int, dict[str, float]]] = []
        self.restart()

    def restart(self) -> None:
        """Another run begins."""
        self.history.clear()
        self.step = 0
        self.measured = self.previous = -1
        self.owed = False
        self.before: dict[str, Any] | None = None
        self._seen: int | None = None

    def advance(self, global_step: int) -> bool:
        """Count an update, if one was made since this was asked last.

        Counting changes counts updates under accumulation and with several optimizers
        too, where `global_step` stands still or jumps.

        Args:
            global_step: That of the trainer.

        Returns:
            Whether there was one: at the start of a resumed run, if the old one ended
            between an update and our hook behind it.
        """
        made = self._seen is not None and self._seen != global_step
        self._seen = global_step
        self.step += made
        return made

    def begin(self, scheduled: bool) -> None:
        """A measurement begins.

        Args:
            scheduled: False for that of a last step off schedule, which leaves no trace
                if there are more steps after all.
        """
        self.before, self.owed = self._now(), scheduled
        self.previous, self.measured = self.measured, self.step

    def end(self, scheduled: bool) -> None:
        """The measurement is complete, or failed in a way that lets the run go on."""
        self.owed = False
        if scheduled:
            self.before = None

    def take_back(self) -> None:
        """As if an interrupted measurement, or one of a last step, had not been."""
        if self.before is not None:
            self.measured = self.before["measured"]
            self.instrument.load_state_dict(self.before["instrument"])
            if self.owed:
                self.history[:] = self.before["history"]
        self.before, self.owed = None, False

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        state = self._now() if self.before is None else self.before
        return {
            **state,
            "history": [(step, dict(scalars)) for step, scalars in state["history"]],
            "step": self.step,
            "seen": self._seen,
            "owed": self.owed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, in a run that has just begun."""
        self.step = state["step"]
        self.measured = state["measured"]
        self.history += [(step, dict(found)) for step, found in state["history"]]
        self.instrument.load_state_dict(state["instrument"])
        # Checkpoints of earlier versions do not have these.
        self._seen = state.get("seen")
        self.owed = state.get("owed", False)

    def _now(self) -> dict[str, Any]:
        return {
            "measured": self.measured,
            "history": [*self.history],
            "instrument": self.instrument.state_dict(),
        }

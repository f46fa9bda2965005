"""What becomes of a monitor whose measurements fail: it warns and steps aside."""

from collections.abc import Iterable
from typing import Literal, TypeAlias, get_args

from ntk_callbacks.callbacks.namespaces import rank_zero_warn
from ntk_callbacks.errors import (
    MemoryBudgetError,
    ProbeError,
    ProbeMismatchError,
    UnsupportedModelError,
)

OnError: TypeAlias = Literal["warn", "raise"]

_REFUSALS = (MemoryBudgetError, ProbeError, ProbeMismatchError, UnsupportedModelError)
_PATIENCE = 3  # failures in a row after which a monitor steps aside for good


class Failures:
    """Counts what failed in a run, and says so.

    Args:
        who: Named in messages.
        on_error: `"warn"`, or `"raise"` what failed.

    Raises:
        ValueError: If `on_error` is neither.
    """

    def __init__(self, who: str, on_error: OnError) -> None:
        if on_error not in get_args(OnError):
            raise ValueError(f"on_error={on_error!r}; expected 'warn' or 'raise'.")
        self.who = who
        self.on_error = on_error
        self.restart()

    def restart(self) -> None:
        """Another run begins."""
        self.off = False
        """Whether the monitor measures no more in this run."""
        self._in_a_row = 0
        self._complained: set[str] = set()
        self._last: tuple[int, str] | None = None

    def none(self) -> None:
        """A measurement was taken."""
        self._in_a_row = 0

    def skip(
        self, error: Exception, step: int, told: Iterable["Failures"] = ()
    ) -> None:
        """A measurement failed.

        Args:
            error: Why; raised again if that is wanted.
            step: Of the measurement.
            told: What others said of this step already; it is not said again.
        """
        if self.on_error == "raise":
            raise error
        self._in_a_row += 1
        self.off = isinstance(error, _REFUSALS) or self._in_a_row >= _PATIENCE
        after = (
            "The monitor is off for the rest of this run"
            if self.off
            else "The next measurement is tried as planned"
        )
        what = " ".join([str(error), *getattr(error, "__notes__", [])])
        self._last = step, f"{type(error).__name__}: {what}"
        same = next((other.who for other in told if other._last == self._last), None)
        why = self._last[1] if same is None else f"for the same reason as {same}'s"
        rank_zero_warn(
            f"{self.who}: the measurement of step {step} failed ({why}). {after}; "
            "training goes on."
        )

    def not_taken(self, by: Iterable[tuple[str, Exception]], step: int) -> None:
        """Some logger did not take a measurement; each is complained of once.

        Args:
            by: Name of each and what it raised; raised again if that is wanted.
            step: Of the measurement.
        """
        for name, error in by:
            if self.on_error == "raise":
                raise error
            if name in self._complained:
                continue
            self._complained.add(name)
            notes = "".join(f" {note}" for note in getattr(error, "__notes__", []))
            rank_zero_warn(
                f"{self.who}: {name} did not take the measurement of step {step} "
                f"({type(error).__name__}: {error}).{notes} Other loggers got it, the "
                "monitor has it in memory, and training goes on. If it fails again, "
                "nothing more is said."
            )

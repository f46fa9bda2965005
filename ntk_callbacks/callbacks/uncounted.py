"""Updates that a trainer does not count: no monitor can see them, but can say so."""

from typing import Any

from ntk_callbacks.callbacks.ending import weight_sums
from ntk_callbacks.callbacks.namespaces import rank_zero_warn


class UncountedUpdates:
    """Warns where weights move in an epoch though `trainer.global_step` stands still.

    Lightning counts the calls of `step` of the optimizers that it hands out. A module
    with manual optimization may pass it by: through the optimizers inside, or through
    other methods of theirs, such as `second_step` of sharpness-aware minimization.

    Args:
        who: Named in the warning.
    """

    def __init__(self, who: str) -> None:
        self.who = who
        self._start: tuple[int, list[int]] | None = None

    def begin(self, trainer: Any, pl_module: Any, speaks: bool) -> None:
        """A fit begins.

        Args:
            trainer: Its trainer.
            pl_module: Its module.
            speaks: Whether this is the monitor that says it for all.
        """
        manual = not getattr(pl_module, "automatic_optimization", True)
        watched = speaks and manual and trainer.is_global_zero
        weights = weight_sums(pl_module) if watched else []
        self._start = (trainer.global_step, weights) if watched else None

    def end_epoch(self, trainer: Any, pl_module: Any) -> None:
        """Its first epoch ends; later ones are not looked at."""
        start, self._start = self._start, None
        if start is None or start[0] != trainer.global_step:
            return
        if start[1] != weight_sums(pl_module):
            rank_zero_warn(
                f"{self.who}: the weights change, but trainer.global_step stands still "
                f"at {trainer.global_step}, so that monitors see no update and measure "
                f"nothing more. {type(pl_module).__name__} optimizes manually: let it "
                "make each update by `self.optimizers().step()`, which is counted."
            )

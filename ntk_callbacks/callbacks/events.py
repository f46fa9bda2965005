"""What can happen during training that is worth a measurement."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ntk_callbacks.callbacks.schedule import (
    Schedule,
    count_of,
    never,
    positive_number,
)


@dataclass(frozen=True)
class LossSpike:
    """The loss rises far above its recent values, or is no longer finite.

    A spike is a loss more than `deviations` standard deviations above the mean, both
    taken over about the last `over` updates with exponentially falling weights. It
    happens once, at its first update, and not before `over` updates were seen.

    Args:
        deviations: More than 0.
        over: Updates, at least 2.
    """

    deviations: float
    over: int
    needs_loss: ClassVar[bool] = True

    @property
    def text(self) -> str:
        """As `loss_spike` would be called."""
        return f"loss spike ({self.deviations:g} deviations over {self.over} updates)"

    def happens(
        self, memory: dict[str, Any], loss: float, rates: Sequence[float]
    ) -> bool:
        """See `Event`."""
        seen = memory.get("seen", 0)
        mean, variance = memory.get("mean", 0.0), memory.get("variance", 0.0)
        if math.isfinite(loss):
            high = loss - mean > self.deviations * math.sqrt(variance)
            # Equal weights at first: the mean of few values is not that of the first.
            share = max(1 / (seen + 1), 1 / self.over)
            off = loss - mean
            memory["mean"] = mean + share * off
            memory["variance"] = (1 - share) * (variance + share * off * off)
            memory["seen"] = seen + 1
        else:
            high = True
        happens = high and seen >= self.over and not memory.get("high", False)
        memory["high"] = high
        return bool(happens)


@dataclass(frozen=True)
class RateChange:
    """A learning rate is `factor` times or 1/`factor` of what it was.

    Compared with the rates at the last change, at first with those of the first update:
    a slow decay happens at each factor that it covers.

    Args:
        factor: More than 1.
    """

    factor: float
    needs_loss: ClassVar[bool] = False

    @property
    def text(self) -> str:
        """As `learning_rate_change` would be called."""
        return f"learning-rate change (by {self.factor:g})"

    def happens(
        self, memory: dict[str, Any], loss: float, rates: Sequence[float]
    ) -> bool:
        """See `Event`."""
        before = memory.get("rates")
        happens = before is not None and (
            len(before) != len(rates) or any(map(self._differs, before, rates))
        )
        if before is None or happens:
            memory["rates"] = [float(rate) for rate in rates]
        return happens

    def _differs(self, before: float, now: float) -> bool:
        low, high = sorted((abs(before), abs(now)))
        # Rates are products of decays: 0.1 · 0.1 is not quite 0.01.
        return high > 0 and low * self.factor <= high * (1 + 1e-9)


def loss_spike(deviations: float = 4.0, over: int = 50) -> Schedule:
    """When the loss of a batch rises far above its recent values, or is not finite.

    A spike is a loss more than `deviations` standard deviations above the mean, both
    over about the last `over` updates. It is measured once, right after the update with
    which it begins. Reading the loss at each update waits for an accelerator.

    Args:
        deviations: More than 0.
        over: Updates; the first so many cannot be spikes. At least 2.

    Returns:
        A schedule.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> loss_spike(3).text
        'loss spike (3 deviations over 50 updates)'
    """
    if count_of("loss_spike: over", over) < 2:
        raise ValueError(f"loss_spike: over={over!r}; expected at least 2 updates.")
    event = LossSpike(positive_number("loss_spike: deviations", deviations), over)
    return Schedule(event.text, never, never, (event,))


def learning_rate_change(factor: float = 2.0) -> Schedule:
    """When a learning rate is `factor` times, or 1/`factor` of, what it was.

    Compared with the last such change, at first with the first update; measured right
    after the first update with the new rate. A slow decay is measured each time that
    it has covered the factor.

    Args:
        factor: More than 1.

    Returns:
        A schedule.

    Raises:
        ValueError: If the factor is not more than 1.

    Example:
        >>> learning_rate_change().text
        'learning-rate change (by 2)'
    """
    event = RateChange(positive_number("learning_rate_change: factor", factor, 1.0))
    return Schedule(event.text, never, never, (event,))

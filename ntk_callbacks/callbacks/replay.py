"""The measurements of a run from its saved weights, by the code that measures live."""

import time
from pathlib import Path
from typing import Any

from torch import nn

from ntk_callbacks.callbacks.history import conventions
from ntk_callbacks.callbacks.monitor import Monitor
from ntk_callbacks.callbacks.precautions import mute
from ntk_callbacks.guard import quietly
from ntk_callbacks.instruments.instrument import monitor_tag
from ntk_callbacks.probe import Probe
from ntk_callbacks.record import Measurement
from ntk_callbacks.reporting.history_file import FOLDER, HistoryFile


class Replay:
    """What one monitor would have measured, had it been there.

    Args:
        monitor: Its instrument measures; its schedule does not matter.
        folder: The measurements are kept in its `ntk_history`, for `load_history`. What
            an earlier replay kept of this monitor is void with the first one.
        loader: Where a monitor that was given a number draws its examples, as in a run.

    Raises:
        ValueError: If the monitor was given a number, and there is no loader.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from ntk_callbacks import JacobianMonitor, load_history
        >>> replay = Replay(JacobianMonitor(torch.eye(2)), tempfile.mkdtemp())
        >>> model = nn.Linear(2, 2)
        >>> for step in (0, 10):
        ...     _ = nn.init.constant_(model.weight, 1.0 + step)
        ...     _ = replay.measure(model, step)
        >>> load_history(replay.folder)["jacobian/mean_square"].values
        array([  2., 242.])
    """

    def __init__(
        self,
        monitor: Monitor,
        folder: str | Path,
        loader: Any = None,
    ) -> None:
        self.monitor = monitor
        self.folder = Path(folder)
        self._probe: Probe | None = None
        if isinstance(monitor.source, Probe):
            self._probe = monitor.source
        elif monitor.source is not None:
            if loader is None:
                raise ValueError(
                    f"{type(monitor).__name__}: there are no training data to draw "
                    f"{monitor.source} examples from. Give a saved probe."
                )
            self._probe = Probe.from_loader(loader, monitor.source)
        name = monitor.instrument.name
        self._file = HistoryFile(self.folder / FOLDER, name, monitor.kept.matrices)
        self._previous = -1

    def measure(self, model: nn.Module, step: int) -> Measurement:
        """Measure weights, and keep what was measured.

        Args:
            model: It holds them; left exactly as it was.
            step: Completed optimizer updates, more than at the previous call.

        Returns:
            The measurement.
        """
        instrument = self.monitor.instrument
        start = time.perf_counter()
        with quietly(model):
            mute(model)
            if self._previous < 0 and self._probe is not None:
                instrument.start(self._probe)
            measurement = instrument.measure(model, step)
        tag = monitor_tag("seconds", instrument.name)
        measurement.scalars[tag] = time.perf_counter() - start
        if self._file.conventions is None:
            meaning = conventions(instrument, self._probe, model)
            self._file.conventions = {**meaning, "replayed": True}
        self._file.append(measurement, after=self._previous)
        self._previous = step
        return measurement

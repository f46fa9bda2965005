"""Where a monitor keeps its measurements besides the loggers, and what they mean."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, is_dataclass
from inspect import signature
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ntk_callbacks.callbacks.precautions import stable_text
from ntk_callbacks.instruments.instrument import Instrument
from ntk_callbacks.probe import Probe
from ntk_callbacks.record import Measurement
from ntk_callbacks.reporting.history import load_history
from ntk_callbacks.reporting.history_file import FOLDER, HistoryFile
from ntk_callbacks.reporting.over_time import LOGARITHMS, draw_over_time

History: TypeAlias = bool | str | PathLike[str]


class MonitorHistory:
    """Keeps measurements in `<folder of the run>/ntk_history`, for `load_history`.

    The folder of the run is that of the first logger that has one; without such a
    logger, the trainer's `default_root_dir` if it was set. If neither is there, nothing
    is written: the working directory belongs to the user.

    Args:
        instrument: Whose measurements they are.
        target: True, False for no files, or a folder to be that of the run.
        matrices: Keep matrices too.

    Raises:
        ValueError: If `target` is neither a flag nor a path.
    """

    def __init__(self, instrument: Instrument, target: History, matrices: bool) -> None:
        if not isinstance(target, bool | str | PathLike) or target == "":
            raise ValueError(
                f"history={target!r}; expected True, False, or the path of a folder."
            )
        self.instrument = instrument
        self.target = target
        self.matrices = matrices
        self.probe: Probe | None = None
        self.restart()

    def restart(self) -> None:
        """Another run begins, or one goes on from a checkpoint."""
        self._file: HistoryFile | None = None
        self._off = False
        self._spectra: list[str] = []

    def keep(
        self,
        measurement: Measurement,
        trainer: Any,
        pl_module: nn.Module,
        after: int,
        earlier: Sequence[tuple[int, dict[str, float]]],
    ) -> list[tuple[str, Exception]]:
        """Append a measurement, unless an earlier one could not be written.

        Args:
            measurement: What to keep.
            trainer: Says where the run lies.
            pl_module: What was measured.
            after: Step of the previous measurement, -1 if there is none.
            earlier: What the monitor remembers of earlier measurements.

        Returns:
            Empty, or which file failed and why.
        """
        if self._off:
            return []
        folder: Path | None = None
        try:
            folder = run_folder(trainer, self.target)
            if folder is None:
                return []
            if self._file is None or self._file.folder != folder / FOLDER:
                name = self.instrument.name
                self._file = HistoryFile(folder / FOLDER, name, self.matrices)
            if self._file.conventions is None:
                meaning = conventions(self.instrument, self.probe, pl_module)
                self._file.conventions = meaning
            self._file.append(measurement, after, earlier)
            self._spectra = [t for t in measurement.vectors if t.endswith(LOGARITHMS)]
        except Exception as error:  # a full disk, a read-only folder, an odd logger
            self._off = True
            return [(f"the history in {folder}", error)]
        return []

    def draw(self, loggers: Iterable[Any]) -> list[tuple[str, Exception]]:
        """Log images of what was kept, when a run ends: spectra over the steps.

        Args:
            loggers: Those of the trainer.

        Returns:
            Empty, or what failed and why.
        """
        if self._file is None or self._off or not self._spectra:
            return []
        try:
            history = load_history(self._file.folder)
            return draw_over_time(history, self._spectra, loggers)
        except Exception as error:  # a folder that was moved or altered meanwhile
            return [(f"the history in {self._file.folder}", error)]


def run_folder(trainer: Any, target: History = True) -> Path | None:
    """Folder of a run, where its history belongs.

    Args:
        trainer: The trainer; asked on rank zero, so nothing that waits for others.
        target: As in `MonitorHistory`.

    Returns:
        An absolute path, or None if nothing is to be written.
    """
    if target is False or trainer.fast_dev_run:
        return None
    if target is not True:
        return Path(target).absolute()
    for logger in trainer.loggers:
        if (folder := _logger_folder(logger)) is not None:
            return folder
    root = Path(str(trainer.default_root_dir)).absolute()
    remote = "://" in str(trainer.default_root_dir)
    return None if remote or root == Path.cwd() else root


def _logger_folder(logger: Any) -> Path | None:
    """`log_dir`, or `save_dir/name/version` as Lightning's checkpoints have it."""
    parts: list[Any] = [getattr(logger, "log_dir", None)]
    if not isinstance(parts[0], str | PathLike):
        version = getattr(logger, "version", None)
        version = f"version_{version}" if isinstance(version, int) else str(version)
        parts = [getattr(logger, part, None) for part in ("save_dir", "name")]
        parts.append(version)
    if not all(isinstance(part, str | PathLike) for part in parts):
        return None
    remote = any("://" in str(part) for part in parts)
    return None if remote else Path(*parts).absolute()


def conventions(
    instrument: Instrument, probe: Probe | None, model: nn.Module
) -> dict[str, Any]:
    """What the numbers of an instrument mean, as plain data.

    Args:
        instrument: Its public settings and the texts in its state are taken.
        probe: What it measures on; None if it needs no inputs.
        model: Whose weights are measured.

    Returns:
        Texts and numbers, ready for JSON.
    """
    from ntk_callbacks import __version__

    # Not all that is public: what an instrument is handed later is no setting.
    names = signature(type(instrument)).parameters
    settings = {k: v for k, v in vars(instrument).items() if k in names}
    for name, value in tuple(settings.items()):
        if is_dataclass(value) and not isinstance(value, type):
            settings |= asdict(settings.pop(name))
    state = {k: v for k, v in instrument.state_dict().items() if isinstance(v, str)}
    weights = [p for p in model.parameters() if not is_lazy(p)]
    dtypes = {str(p.dtype).removeprefix("torch.") for p in weights}
    settings.pop("history", None)
    state.pop("digest", None)  # that of the probe, below
    return {
        **{name: _plain(value) for name, value in {**settings, **state}.items()},
        "instrument": type(instrument).__name__,
        "scaling": None,  # of the parameters: monitors measure J Jᵀ, not J Λ Jᵀ
        "model": type(model).__name__,
        "parameter_count": sum(p.numel() for p in weights),
        "dtype": ", ".join(sorted(dtypes)),
        "probe_examples": None if probe is None else probe.n,
        "probe_digest": None if probe is None else probe.digest,
        "version": __version__,
        "torch": str(torch.__version__),
        "seed": os.environ.get("PL_GLOBAL_SEED"),
        "torch_seed": torch.initial_seed(),
    }


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return [str(key) for key in value]
    if isinstance(value, list | tuple | set):
        return [stable_text(part) for part in value]
    return stable_text(value)

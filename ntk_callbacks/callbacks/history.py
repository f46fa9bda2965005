"""Where a monitor keeps its measurements besides the loggers, and what they mean."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, is_dataclass
from inspect import signature
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import unquote

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ntk_callbacks.callbacks.namespaces import rank_zero_warn
from ntk_callbacks.callbacks.precautions import stable_text
from ntk_callbacks.callbacks.progress import Progress
from ntk_callbacks.guard import isolated_rng
from ntk_callbacks.instruments.instrument import Instrument
from ntk_callbacks.probe import Probe
from ntk_callbacks.record import Measurement
from ntk_callbacks.reporting.history import history_of
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
        known = isinstance(target, bool | str | PathLike)
        if not known or target == "" or "://" in str(target):
            raise ValueError(
                f"history={target!r}; expected True, False, or the path of a folder on "
                "this machine."
            )
        self.instrument = instrument
        self.target = target
        self.matrices = matrices
        self.probe: Probe | None = None
        self.restart()

    def restart(self) -> None:
        """Another run begins, or one goes on from a checkpoint."""
        self.since = 0
        """Step before which nothing of this run was measured; what a file holds of
        earlier ones is kept."""
        self._file: HistoryFile | None = None
        self._failed = False
        self._spectra: list[str] = []

    def keep(
        self,
        measurement: Measurement,
        trainer: Any,
        pl_module: nn.Module,
        progress: Progress,
    ) -> list[tuple[str, Exception]]:
        """Append a measurement, and what earlier attempts could not write.

        Args:
            measurement: What to keep.
            trainer: Says where the run lies.
            pl_module: What was measured.
            progress: Of the monitor; remembers this measurement and those before.

        Returns:
            Empty, or which file failed and why.
        """
        earlier = progress.history[:-1]
        after = progress.previous if earlier else self.since - 1
        try:
            if self._file is None:  # one place, though the working directory may change
                folder = run_folder(trainer, self.target)
                if folder is None:
                    return []
                name = self.instrument.name
                self._file = HistoryFile(folder / FOLDER, name, self.matrices)
                if not (earlier or self.since):
                    self._tell_of_another_run(trainer)
            if self._file.conventions is None:
                meaning = conventions(self.instrument, self.probe, pl_module)
                self._file.conventions = meaning
            self._file.append(measurement, after, earlier)
        except Exception as error:  # a full disk, a read-only folder, an odd logger
            self._failed = True
            error.add_note(
                "Its numbers are written with the next measurement or at the end of "
                "the run, if that is possible by then; history=<folder> chooses "
                "another place."
            )
            where = "this run" if self._file is None else str(self._file.folder.parent)
            return [(f"the history in {where}", error)]
        self._failed = False
        self._spectra = [t for t in measurement.vectors if t.endswith(LOGARITHMS)]
        return []

    def finish(
        self, loggers: Iterable[Any], measured: Sequence[tuple[int, dict[str, float]]]
    ) -> list[tuple[str, Exception]]:
        """When a run ends: write what is missing, log images of spectra over the steps.

        Args:
            loggers: Those of the trainer.
            measured: What the monitor remembers.

        Returns:
            Empty, or what failed and why.
        """
        if self._file is None:
            return []
        try:
            if self._failed:
                self._file.catch_up(measured)
            if not self._spectra:
                return []
            history = history_of(self._file.folder, [self._file.path])
            with isolated_rng():  # loggers that wait and try again draw how long
                return draw_over_time(history, self._spectra, loggers)
        except Exception as error:  # the disk again, or a folder that was altered
            return [(f"the history in {self._file.folder.parent}", error)]

    def _tell_of_another_run(self, trainer: Any) -> None:
        """Once for all monitors that write there."""
        assert self._file is not None
        kept = [getattr(callback, "kept", None) for callback in trainer.callbacks]
        beside = [k for k in kept if isinstance(k, MonitorHistory)]
        if next(k for k in beside if k.target == self.target) is not self:
            return
        if found := sorted(p.stem for p in self._file.folder.glob("*.jsonl")):
            rank_zero_warn(
                f"{self._file.folder} holds the measurements of another run "
                f"({', '.join(map(unquote, found))}). Those of monitors with the same "
                "names are superseded; load_history reads the others as if they were "
                "of this run. Give each run a folder of its own: a new version of the "
                "logger, another default_root_dir, or history=<folder>."
            )


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
        return Path(target).expanduser().absolute()
    for logger in trainer.loggers:
        try:
            folder = _logger_folder(logger)
        except Exception:  # its server does not answer; the next one may have a folder
            continue
        if folder is not None:
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

"""Monitors in the Trainer of Hugging Face's transformers."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from transformers import TrainerCallback

from ntk_callbacks.callbacks.ending import weight_sums
from ntk_callbacks.callbacks.hugging_face_run import HuggingFaceRun
from ntk_callbacks.callbacks.monitor import Monitor
from ntk_callbacks.instruments.kernel_stability import unwrapped

_FILE = "ntk_callbacks.pt"


class NTKTrainerCallback(TrainerCallback):
    """Lets monitors measure a model that the Trainer of transformers trains.

    Every monitor measures at step 0, when its schedule says so, and at the end; steps
    are `state.global_step`. Training stays bit for bit as it was. Numbers go to
    `state.log_history` and to `loggers`; `load_history(args.output_dir)` reads what is
    kept in files. Checkpoints hold the references in `ntk_callbacks.pt`, so that a run
    resumed from a checkpoint in `args.output_dir` goes on with its curves.

    The outputs are the `logits` that the model returns; `output_fn` of a monitor says
    otherwise. A probe given as a number is drawn from the training data through their
    collator: `labels` are the targets, all else are keywords of the model. Mixed
    precision is left aside: the weights are measured in their own precision.
    `max_overhead` and events of learning rate work as in Lightning. The Trainer shows
    its callbacks no batches, so that no twin is trained
    (`LinearizationMonitor(twin=True)`), and losses only where it logs them. With
    `logging_steps=1` an update in which the loss spikes is measured as soon as its loss
    is logged, though `PredictionMonitor` could not foretell it. What is logged less
    often is a mean over several updates: no spike is seen in it, and a warning says so.
    Losses that are not finite are seen with `logging_nan_inf_filter=False` alone.

    Args:
        monitors: One or several of `NTKMonitor`, `ParameterDriftMonitor` and the like.
        loggers: Objects with `log_metrics(metrics, step)`, such as Lightning's loggers.
            None writes for TensorBoard in `<output_dir>/runs/ntk` if the Trainer does
            (`report_to="tensorboard"`).

    Raises:
        TypeError: If something else than a monitor is given.

    Example:
        >>> from ntk_callbacks import NTKMonitor, ParameterDriftMonitor
        >>> monitors = [NTKMonitor(32, "5 per decade"), ParameterDriftMonitor()]
        >>> callback = NTKTrainerCallback(monitors)  # Trainer(callbacks=[callback], …)
    """

    def __init__(
        self,
        monitors: Monitor | Sequence[Monitor],
        loggers: Sequence[Any] | None = None,
    ) -> None:
        self.monitors = [monitors] if isinstance(monitors, Monitor) else list(monitors)
        self.loggers = loggers
        for monitor in self.monitors:
            if not isinstance(monitor, Monitor):
                raise TypeError(
                    f"NTKTrainerCallback takes monitors such as NTKMonitor(), not a "
                    f"{type(monitor).__name__}."
                )
        self._run: HuggingFaceRun | None = None
        self._logged = 0  # updates at the last log: more than one since is a mean

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Measure step 0, or go on where a checkpoint stopped."""
        self._run = HuggingFaceRun(args, self._loggers(args), self.monitors)
        for monitor in self.monitors:
            monitor.setup(self._run, given["model"], "fit")
        if state.global_step > 0:
            self._load(args, state, given["model"])
        self._logged = state.global_step
        events = [e for m in self.monitors for e in m.when.schedule.events]
        each = args.logging_strategy == "steps" and state.logging_steps == 1
        if not each and any(event.needs_loss for event in events):
            _warn(
                "loss spikes are seen only where the loss of each update is logged. "
                "Pass TrainingArguments(logging_steps=1) to measure them."
            )
        self._tell("on_train_start", state, control, given)

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, **given: Any
    ) -> None:
        """What a monitor foretells of the update; gradients are clipped by now."""
        (optimizer,) = unwrapped([given["optimizer"]])
        self._tell("on_before_optimizer_step", state, control, given, optimizer)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Measure after an update, if it is due; before a checkpoint is written."""
        self._tell("on_train_batch_end", state, control, given, None, None, 0)

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Measure after an update whose loss spikes, before anything follows it."""
        logs = given.get("logs") or {}
        if "loss" not in logs:  # of an evaluation, or somebody else's
            return
        updates, self._logged = state.global_step - self._logged, state.global_step
        if updates == 1:
            self._tell("on_late_loss", state, control, given, float(logs["loss"]))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Measure what the last update could not know of."""
        self._tell("on_train_epoch_end", state, control, given)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Measure the last step, if nobody put other weights into the model since."""
        self._tell("on_train_end", state, control, given)

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """References, beside the weights."""
        folder = _checkpoint(args, state)
        if not (state.is_world_process_zero and folder.is_dir()):
            return
        states = {monitor.state_key: monitor.state_dict() for monitor in self.monitors}
        content = {"monitors": states, "weights": weight_sums(given["model"])}
        try:
            torch.save(content, folder / _FILE)
        except (OSError, RuntimeError) as error:  # a full disk stops no training
            _warn(f"the references of step {state.global_step} are not kept: {error}.")

    def _load(self, args: Any, state: Any, model: nn.Module) -> None:
        path = _checkpoint(args, state) / _FILE
        if not path.is_file():
            return  # each monitor says that it takes its references now
        kept = torch.load(path, map_location="cpu", weights_only=True)
        if kept["weights"] != weight_sums(model):
            _warn(f"{str(path)!r} belongs to other weights; it is not read.")
            return
        for monitor in self.monitors:
            if monitor.state_key in kept["monitors"]:
                monitor.load_state_dict(kept["monitors"][monitor.state_key])

    def _loggers(self, args: Any) -> list[Any]:
        if self.loggers is not None:
            return list(self.loggers)
        if "tensorboard" not in args.report_to:
            return []
        return [
            TensorBoardLogger(
                args.output_dir, name="runs", version="ntk", default_hp_metric=False
            )
        ]

    def _tell(
        self, hook: str, state: Any, control: Any, given: dict[str, Any], *rest: Any
    ) -> None:
        if self._run is None:
            return
        before = hook == "on_before_optimizer_step"
        self._run.look(state, control, given, step=state.global_step + before)
        for monitor in self.monitors:
            getattr(monitor, hook)(self._run, given["model"], *rest)


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir, f"checkpoint-{state.global_step}")


def _warn(what: str) -> None:
    warnings.warn(f"NTKTrainerCallback: {what}", stacklevel=3)

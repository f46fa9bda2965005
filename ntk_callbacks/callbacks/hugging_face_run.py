"""A run of Hugging Face's Trainer as monitors see a trainer."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from ntk_callbacks.instruments.kernel_stability import unwrapped


class HuggingFaceRun:
    """What monitors ask a Lightning trainer for, answered from a Trainer's state.

    Args:
        args: The `TrainingArguments`.
        loggers: Where measurements go besides `state.log_history`.
        monitors: All monitors of the run.
    """

    fast_dev_run = False
    max_epochs = -1
    min_epochs = min_steps = None
    # Measured in one process, on gradients that are reduced by then.
    world_size = 1
    precision_plugin = None
    lr_scheduler_configs = ()
    gradient_clip_val = gradient_clip_algorithm = None  # clipped by then

    def __init__(
        self, args: Any, loggers: Sequence[Any], monitors: Sequence[Any]
    ) -> None:
        self.default_root_dir = args.output_dir
        self.accumulate_grad_batches = args.gradient_accumulation_steps
        self.callbacks = list(monitors)
        self.callback_metrics: dict[str, torch.Tensor] = {}
        self._log = _LogHistory(args.output_dir)
        self.loggers = [self._log, *loggers]
        kind = "DeepSpeed" if args.deepspeed else "FSDP" if args.fsdp else "Replicated"
        self.strategy = type(kind, (), {})()  # monitors refuse the first two by name

    def look(self, state: Any, control: Any, given: dict[str, Any], step: int) -> None:
        """Take in where the run stands.

        Args:
            state: The `TrainerState`.
            control: The `TrainerControl`.
            given: What else the Trainer hands to its callbacks.
            step: The update that is being made, or was made last.
        """
        self.global_step = state.global_step
        self.max_steps = state.max_steps
        self.is_global_zero = state.is_world_process_zero
        self.should_stop = control.should_training_stop
        self.train_dataloader = loader = given["train_dataloader"]
        self.optimizers = unwrapped([given["optimizer"]])
        try:
            updates = math.ceil(len(loader) / self.accumulate_grad_batches)
        except TypeError:  # a stream: the Trainer takes all of it for one epoch
            updates = state.max_steps
        self.is_last_batch = step % max(updates, 1) == 0
        self.current_epoch = max(step - 1, 0) // max(updates, 1)
        self._log.state = state


class _LogHistory:
    """Adds rows to `state.log_history`, which goes into `trainer_state.json`."""

    def __init__(self, folder: str) -> None:
        self.log_dir = folder  # where the history files of a run belong
        self.state: Any = None

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        row = {**metrics, "epoch": self.state.epoch, "step": step}
        self.state.log_history.append(row)

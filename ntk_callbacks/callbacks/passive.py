"""Proof on a user's own model that a callback only watches."""

import copy
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partialmethod
from typing import Any

import lightning.pytorch
import pytorch_lightning
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import nn

from ntk_callbacks.callbacks.training_state import fingerprint, training_state
from ntk_callbacks.guard import isolated_rng, quietly

_CHECKPOINTS = (
    lightning.pytorch.callbacks.Checkpoint,
    pytorch_lightning.callbacks.Checkpoint,
)
_TRAINERS = ("_trainer", "trainer", "_fabric")
_LOGGED = "what was logged"
_MAY_BE_ADDED = ("metric ", "logged series ")
_BESIDE = {"epoch"}  # in every row, whoever logs


def assert_passive(
    callbacks: Any, module: nn.Module, data: Any, *, seed: int = 0, **settings: Any
) -> None:
    """Raise AssertionError unless training with the callbacks is training without them.

    Copies of the module are trained twice from the same seeds, with and without the
    callbacks. At every hook, from the start to the end, and after each batch, these
    must agree bit for bit: weights, buffers, gradients, states and settings of the
    optimizers; `training` and `requires_grad` flags, hooks and attributes of every
    submodule; the random generators of Python, NumPy and torch; flags of the process;
    batches, results of the training step, and whatever is logged (callbacks may log
    more). Holds for any Lightning callback, of this package or not.

    Args:
        callbacks: A callback or several.
        module: The LightningModule. It and everything else given are copied, and left
            as they are.
        data: Training batches as `Trainer.fit` takes them: a loader or a
            LightningDataModule. Validation runs too if a module or data module has it.
        seed: Where the random generators start.
        **settings: For the Trainer. By default 8 updates (`max_steps`) on one device,
            logging each; `accumulate_grad_batches=2` shows callbacks that
            touch half-accumulated gradients.

    Raises:
        AssertionError: Names the first difference and the hook in which it was seen.
        TypeError: If something given cannot be copied.
        ValueError: If no update was made.

    Example:
        >>> from lightning.pytorch import LightningModule
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from ntk_callbacks import ParameterDriftMonitor
        >>> class Line(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = nn.Linear(3, 1)
        ...     def training_step(self, batch, _):
        ...         return self.net(batch[0]).square().mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> loader = DataLoader(TensorDataset(torch.ones(8, 3)), batch_size=2)
        >>> assert_passive(ParameterDriftMonitor(), Line(), loader, accelerator="cpu")
    """
    given = list(callbacks) if isinstance(callbacks, Sequence) else [callbacks]
    who = ", ".join(type(callback).__name__ for callback in given)
    bare = _course([], module, data, seed, settings)
    if all(seen.get("completed updates", "0") == "0" for _, seen in bare):
        raise ValueError("assert_passive: the training made no step; is data empty?")
    found = _first_difference(bare, _course(given, module, data, seed, settings))
    if found is None:
        return
    again = _first_difference(bare, _course([], module, data, seed, settings))
    if again is not None:
        raise AssertionError(
            "assert_passive: two runs without any callback differ too, so that nothing "
            f"can be said of {who}: {again}. Make the training repeatable, for example "
            "by deterministic=True, and try again."
        )
    raise AssertionError(f"{who} changes the training {found}.")


_Course = list[tuple[str, dict[str, str]]]


def _course(
    callbacks: list[Any], module: nn.Module, data: Any, seed: int, settings: Any
) -> _Course:
    """What a run looks like at every hook, and what it logs."""
    ours, theirs = lightning.pytorch, pytorch_lightning
    kind = theirs if isinstance(module, theirs.LightningModule) else ours
    witness, record = _Witness(), _Record()
    devices = {torch.device("cuda", i) for i in range(torch.cuda.device_count())}
    with (
        isolated_rng(devices, seed),
        quietly(module),
        _process_kept(),
        tempfile.TemporaryDirectory() as folder,
    ):
        torch.manual_seed(seed)  # accelerators too
        model, batches = _copy(module), _copy(data)
        watched = [_copy(callback) for callback in callbacks]
        chosen = {
            "max_steps": -1 if "max_epochs" in settings else 8,
            "max_epochs": -1,
            "devices": 1,
            "log_every_n_steps": 1,
            "enable_checkpointing": any(isinstance(c, _CHECKPOINTS) for c in watched),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
            **settings,
        }
        trainer = kind.Trainer(callbacks=[*watched, witness], logger=record, **chosen)
        trainer.fit(model, batches)
    return [*witness.seen, (_LOGGED, record.series())]


@contextmanager
def _process_kept() -> Iterator[None]:
    """What `quietly` leaves to the user, lest one run reaches into the next."""
    threads, anomaly = torch.get_num_threads(), torch.is_anomaly_enabled()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.autograd.set_detect_anomaly(anomaly)


def _copy(value: Any) -> Any:
    # Not the trainer that a module or data module was used with.
    held = getattr(value, "__dict__", {})
    trainers = [held[key] for key in _TRAINERS if hasattr(held.get(key), "__dict__")]
    try:
        return copy.deepcopy(value, {id(trainer): None for trainer in trainers})
    except Exception as error:
        raise TypeError(
            f"assert_passive: a {type(value).__name__} cannot be copied ({error}), but "
            "each run needs its own. Give one that can: a loader instead of an "
            "iterator, a callback without open files."
        ) from error


def _first_difference(bare: _Course, watched: _Course) -> str | None:
    """What differs first between two runs, and when; None if they are the same run."""
    updates = "0"
    for (hook, left), (other, right) in zip(bare, watched, strict=False):
        updates = left.get("completed updates", updates)
        when = f"after {updates} updates, in {hook}"
        if hook != other:
            return f"{when}: {other} came instead"
        for name, value in left.items():
            if right.get(name) != value:
                found = right.get(name, "gone")
                return f"{when}: the {name} is {found}, without callbacks {value}"
        for name, value in right.items():
            if name not in left and not name.startswith(_MAY_BE_ADDED):
                return (
                    f"{when}: the {name} is {value}, without callbacks it is not there"
                )
    if len(bare) != len(watched):
        return f"{len(watched)} hooks came instead of {len(bare)}"
    return None


# Both bases, for trainers of either namespace, as in `Monitor`.
class _Witness(lightning.pytorch.Callback, pytorch_lightning.Callback):  # type: ignore[misc]
    """Writes down the state of a run at every hook, after all other callbacks."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: _Course = []

    def look(
        self,
        trainer: Any,
        pl_module: nn.Module,
        *details: Any,
        hook: str,
        stage: str = "",
    ) -> None:
        state = training_state(trainer, pl_module)
        values = trainer.callback_metrics
        state |= {f"metric {name!r}": fingerprint(v) for name, v in values.items()}
        if "_batch_" in hook:
            state["batch or result of the step"] = fingerprint(details[:2])
        self.seen.append((hook, state))


for _hook in (
    *(
        "setup",
        "on_fit_start",
        "on_sanity_check_end",
        "on_train_start",
        "on_train_epoch_start",
    ),
    *("on_train_batch_start", "on_before_zero_grad", "on_before_backward"),
    *("on_after_backward", "on_before_optimizer_step", "on_train_batch_end"),
    *("on_validation_start", "on_validation_batch_start", "on_validation_batch_end"),
    *("on_validation_end", "on_train_epoch_end", "on_train_end", "on_fit_end"),
    "teardown",
):
    setattr(_Witness, _hook, partialmethod(_Witness.look, hook=_hook))


class _Record(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "passive"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def series(self) -> dict[str, str]:
        names = {name for _, row in self.rows for name in row} - _BESIDE
        return {
            f"logged series {name!r}": repr(
                [(step, row[name]) for step, row in self.rows if name in row]
            )
            for name in sorted(names)
        }

"""The gradients that the optimizer of a Lightning run is about to see."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ntk_callbacks._types import Params
from ntk_callbacks.callbacks.namespaces import module_classes
from ntk_callbacks.callbacks.precautions import mute
from ntk_callbacks.dynamics.optimizer_step import clipped_gradients
from ntk_callbacks.errors import UnsupportedModelError
from ntk_callbacks.guard import quietly
from ntk_callbacks.instruments.predicted_update import held_gradients
from ntk_callbacks.metrics.drift import norm

_CLIPPING = "configure_gradient_clipping"


def unscaled_gradients(trainer: Any, optimizer: Optimizer, pl_module: Any) -> Params:
    """Gradients of the loss; fused optimizers unscale them while they step.

    Args:
        trainer: The trainer, before the step.
        optimizer: About to step.
        pl_module: Whose gradients are held.

    Returns:
        Parameter name -> gradient, before clipping.
    """
    gradients = held_gradients(pl_module, optimizer)
    scaler = gradient_scaler(trainer)
    if scaler and getattr(optimizer, "_step_supports_amp_scaling", False):
        scale = scaler.get_scale()
        gradients = {name: g / scale for name, g in gradients.items()}
    return gradients


def skips_step(
    trainer: Any, pl_module: Any, gradients: Params, differentiated: bool
) -> bool:
    """Whether a gradient scaler will skip the step.

    Args:
        trainer: The trainer.
        pl_module: Its module.
        gradients: Of the step.
        differentiated: Whether a loss of the last batch of the step was; a scaler skips
            steps without one, even where gradients of earlier batches wait for it.

    Returns:
        False wherever there is no scaler.
    """
    if not gradient_scaler(trainer):
        return False
    if getattr(pl_module, "automatic_optimization", False) and not differentiated:
        return True
    return not all(bool(_entries(g).isfinite().all()) for g in gradients.values())


def _entries(gradient: Tensor) -> Tensor:
    return gradient._values() if gradient.is_sparse else gradient


def gradient_scaler(trainer: Any) -> Any:
    """The scaler of half-precision gradients; None if there is none in use."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


class OneEvaluation:
    """Refuses optimizers that evaluate the loss again while they step, as SAM does.

    Those that need a closure for it say so; of others it shows only in a run.
    """

    def __init__(self) -> None:
        self._last: tuple[int, int] | None = None

    def check(self, trainer: Any, optimizer: Optimizer) -> None:
        """Note that gradients are complete.

        Args:
            trainer: Whose count of steps tells one step from the next.
            optimizer: About to step, or on its way.

        Raises:
            UnsupportedModelError: If it was told so in this step already.
        """
        last, self._last = self._last, (id(trainer), trainer.global_step)
        if self._last == last:
            raise UnsupportedModelError(
                f"{type(optimizer).__name__} evaluates the loss more than once in a "
                "step, which a gradient alone cannot predict. Expected an optimizer "
                "that goes by one gradient."
            )


def clipped_by_trainer(
    trainer: Any, pl_module: Any, optimizer: Optimizer, gradients: Params
) -> Params:
    """The gradients as clipping will leave them, found on copies.

    Args:
        trainer: Says how it clips.
        pl_module: May clip in its own way.
        optimizer: About to step.
        gradients: Parameter name -> gradient; not of this module, perhaps, but of one
            with the same parameters.

    Returns:
        New tensors, or the same ones where nothing is clipped.

    Raises:
        UnsupportedModelError: If the module clips in its own way on several processes.
    """
    # Whoever steps by hand has clipped by now, and so has a trainer of another library.
    if not getattr(pl_module, "automatic_optimization", False):
        return gradients
    limit, rule = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
    outside = _outside(pl_module, optimizer)
    if not overrides(pl_module, _CLIPPING):
        if not limit:
            return gradients
        # They count for the norm, whatever the module knows of them.
        others = {f" {k}": g for k, (_, g) in enumerate(outside)}
        clipped = clipped_gradients(
            gradients | others,
            **{"max_value" if rule == "value" else "max_norm": limit},
        )
        return {name: clipped[name] for name in gradients}
    if trainer.world_size > 1:
        raise UnsupportedModelError(
            f"{type(pl_module).__name__}.{_CLIPPING} may wait for "
            "other processes, but measurements run on one. Clip with "
            "Trainer(gradient_clip_val=…), or train on one process to predict steps."
        )
    with _gradients_put_back(outside), quietly(pl_module):
        mute(pl_module)
        for parameter, gradient in outside:
            parameter.grad = gradient.clone()
        for name, gradient in gradients.items():
            pl_module.get_parameter(name).grad = gradient.clone()
        pl_module.configure_gradient_clipping(
            optimizer, gradient_clip_val=limit, gradient_clip_algorithm=rule
        )
        return {
            name: gradient.clone()
            for name, gradient in held_gradients(pl_module, optimizer).items()
        }


def share_left(
    trainer: Any, pl_module: Any, optimizer: Optimizer, gradients: Params
) -> float:
    """What part of the gradients clipping leaves.

    Args:
        trainer: Says how it clips.
        pl_module: May clip in its own way.
        optimizer: About to step.
        gradients: Parameter name -> gradient, before clipping.

    Returns:
        A number in [0, 1], 1 where nothing is clipped; NaN where gradients change their
        direction or it is not known: clipped by value, or by the module itself.
    """
    if not getattr(pl_module, "automatic_optimization", False):
        return 1.0
    if overrides(pl_module, _CLIPPING):
        return math.nan
    clipped = clipped_by_trainer(trainer, pl_module, optimizer, gradients)
    if clipped is gradients:
        return 1.0
    whole, left = float(norm(gradients)), float(norm(clipped))
    if trainer.gradient_clip_algorithm == "value":
        return 1.0 if left == whole else math.nan
    return left / whole if whole else 1.0


def _outside(pl_module: Any, optimizer: Optimizer) -> list[tuple[Tensor, Tensor]]:
    """Parameters that are trained but not registered, in a list say; gradients."""
    inside = {id(parameter) for parameter in pl_module.parameters()}
    return [
        (parameter, parameter.grad)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if id(parameter) not in inside and parameter.grad is not None
    ]


@contextmanager
def _gradients_put_back(held: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """For parameters that the guard of a module need not see."""
    try:
        yield
    finally:
        for parameter, gradient in held:
            parameter.grad = gradient


def overrides(pl_module: Any, hook: str) -> bool:
    """Whether a module does this in its own way, in either namespace.

    Args:
        pl_module: The module.
        hook: A method that every LightningModule has.

    Returns:
        False if it is Lightning's.
    """
    return getattr(type(pl_module), hook) not in [
        getattr(kind, hook) for kind in module_classes()
    ]

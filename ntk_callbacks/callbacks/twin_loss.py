"""Whether a network trains on the loss of its linearized twin, as far as it shows."""

import math
from typing import Any

import torch
from torch import Tensor

from ntk_callbacks._types import Params
from ntk_callbacks.callbacks.gradients import gradient_scaler
from ntk_callbacks.callbacks.namespaces import rank_zero_warn
from ntk_callbacks.callbacks.precautions import mute
from ntk_callbacks.guard import eagerly, quietly
from ntk_callbacks.instruments.linearized_twin import LinearizedTwin
from ntk_callbacks.instruments.predicted_update import held_gradients
from ntk_callbacks.layout import widened
from ntk_callbacks.metrics.drift import norm
from ntk_callbacks.probe import Probe

_OTHER = 0.01  # relative difference of gradients that is no round-off


class TwinLoss:
    """Compares gradients of the network with those that the loss of its twin gives it.

    Gradients, not losses: those of most losses are about the same where outputs are
    still near zero, and penalties are small at first. On the first batch, and again
    whenever there were half as many updates more, because a loss may change on the way.
    Says it once.

    Args:
        twin: Knows its loss.
    """

    def __init__(self, twin: LinearizedTwin) -> None:
        self.twin = twin
        self.restart()

    def restart(self) -> None:
        """Another run begins."""
        self._done = False
        self._next, self._largest = 0, 0.0

    def compare(
        self, trainer: Any, pl_module: Any, batch: Probe, weight: float, step: int
    ) -> None:
        """Warn if the loss is another; look no more if there is chance in the network.

        Args:
            trainer: After the backward pass of the network on this batch alone.
            pl_module: Its module.
            batch: The batch.
            weight: That its loss was multiplied with.
            step: Completed updates.
        """
        if self._done or step < self._next:
            return
        self._next = step + max(1, step // 2)
        try:
            expected = self._gradients(trainer, pl_module, batch)
        except RuntimeError:  # second derivatives that are refused, and the like
            self._done = True
            return
        if expected is None:
            self._done = True
            return
        (optimizer,) = trainer.optimizers
        held = held_gradients(pl_module, optimizer)  # others pile up from step to step
        if not held:
            return
        scaler = gradient_scaler(trainer)
        by = weight * scaler.get_scale() if scaler else weight
        gap = self._gap(held, expected, by)
        if gap > _OTHER:
            self._done = True
            rank_zero_warn(
                "LinearizationMonitor: the linearized twin learns something else than "
                f"the network. On a batch after step {step} the gradient of the "
                f"network is off that of the twin's loss by {gap:.2g} of its length. "
                "Pass the loss that the network trains on as loss_fn; penalties, "
                "augmentation and whatever else training_step does is not followed."
            )

    def _gradients(self, trainer: Any, pl_module: Any, batch: Probe) -> Params | None:
        """Of the network by the loss of the twin; None if there is chance in it."""
        # In the precision of the training: round-off can change half of a gradient
        # behind many normalizations.
        with quietly(pl_module, precise=False), eagerly():
            mute(pl_module)
            with trainer.precision_plugin.forward_context():
                first, second = (
                    self.twin.network_loss(pl_module, batch.inputs, batch.targets)
                    for _ in range(2)
                )
            if not torch.isclose(first, second, rtol=1e-5, atol=0.0):
                return None
            named = {n: p for n, p in pl_module.named_parameters() if p.requires_grad}
            found = torch.autograd.grad(second, [*named.values()], allow_unused=True)
        return {n: g for n, g in zip(named, found, strict=True) if g is not None}

    def _gap(self, gradients: Params, expected: Params, by: float) -> float:
        """‖g − expected‖/‖g‖ with g the gradients, divided by a number."""
        found = {name: _dense(gradient) / by for name, gradient in gradients.items()}
        nothing = torch.zeros(())
        differences = {
            name: gradient - _dense(expected.get(name, nothing))
            for name, gradient in found.items()
        }
        gap, length = float(norm(differences)), float(norm(found))
        if not math.isfinite(gap):
            return 0.0
        # Gradients that have all but vanished are sums that cancel: round-off.
        self._largest = max(self._largest, length)
        return gap / max(length, 1e-2 * self._largest) if gap > 0 else 0.0


def _dense(gradient: Tensor) -> Tensor:
    return widened(gradient.to_dense() if gradient.is_sparse else gradient)

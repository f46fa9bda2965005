"""How a linearized twin follows the steps of a Lightning trainer."""

import math
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ntk_callbacks.callbacks.gradients import (
    OneEvaluation,
    clipped_by_trainer,
    gradient_scaler,
    overrides,
    skips_step,
)
from ntk_callbacks.callbacks.namespaces import rank_zero_warn
from ntk_callbacks.callbacks.precautions import mute, refuse_sharded
from ntk_callbacks.errors import UnsupportedModelError
from ntk_callbacks.guard import isolated_rng, quietly
from ntk_callbacks.instruments.linearization_point import LinearizationPoint
from ntk_callbacks.instruments.linearized_twin import LinearizedTwin
from ntk_callbacks.instruments.predicted_update import held_gradients
from ntk_callbacks.probe import Probe

_ALIKE = 1e-3  # relative difference of two losses that are the same but for round-off
_OTHER = 1e-2  # of two that are not


class TwinTraining:
    """Gives a twin the batches, weights and clipping of the trainer.

    Args:
        twin: Is trained.

    Attributes:
        batch: The one that the network is trained on now, as the trainer gives it.
        loss: What the network had on it, by the weight of the batch.
    """

    def __init__(self, twin: LinearizedTwin) -> None:
        self.twin = twin
        self.batch: Any = None
        self.loss: Tensor | None = None
        self._evaluation = OneEvaluation()

    @staticmethod
    def check(trainer: Any, pl_module: Any) -> None:
        """Refuse what a twin cannot follow.

        Args:
            trainer: Before its first batch.
            pl_module: Its module.

        Raises:
            UnsupportedModelError: With the reason.
        """
        refuse_sharded(trainer)
        who = type(pl_module).__name__
        if not hasattr(pl_module, "automatic_optimization"):
            raise UnsupportedModelError(
                "a linearized twin trains on the batches of the network, which the "
                "Trainer of transformers does not show. Train it by hand beside the "
                "network: `dynamics.linearize` makes one."
            )
        if not pl_module.automatic_optimization:
            raise UnsupportedModelError(
                f"{who} optimizes manually, in its own code, which a linearized twin "
                "cannot follow. Train it by hand beside the network: "
                "`dynamics.linearize` makes one."
            )
        if trainer.world_size > 1:
            raise UnsupportedModelError(
                f"{trainer.world_size} processes average their gradients, but a "
                "linearized twin trains on one and sees its batches alone. Train on "
                "one process to compare."
            )

    def forget(self, pl_module: Any) -> None:
        """The gradients of the network are about to be set to zero.

        Args:
            pl_module: The network, which may do that in its own way at other times.
        """
        if not overrides(pl_module, "optimizer_zero_grad"):
            self.twin.forget_gradients()

    def accumulate(
        self, trainer: Any, pl_module: Any, point: LinearizationPoint
    ) -> None:
        """Add the gradient of the twin on the batch.

        Args:
            trainer: After the backward pass of the network.
            pl_module: Its module.
            point: θ₀.

        Raises:
            ProbeError: If inputs and targets of the batch cannot be told.
            UnsupportedModelError: If its loss is not known, there can be no twin, or
                the parameters are no longer those of θ₀.
        """
        point.refuse_others(dict(pl_module.named_parameters()))
        (optimizer,) = trainer.optimizers
        starts = self.twin.parameters is None
        if not self.twin.expanded:
            with quietly(pl_module):
                mute(pl_module)  # the copy that the twin is made of, too
                self.twin.expand(pl_module, optimizer, point)
        elif not self.twin.follows(optimizer):  # a new one for another `fit`
            self.twin.follow(pl_module, optimizer)
        batch = Probe.from_batch(self.batch)
        weight = 1 / trainer.accumulate_grad_batches
        own = self.twin.accumulate(pl_module, batch.inputs, batch.targets, weight)
        if starts and self.loss is not None and not gradient_scaler(trainer):
            self._compare(pl_module, batch, float(self.loss) / weight, float(own))

    def _compare(self, pl_module: Any, batch: Probe, loss: float, own: float) -> None:
        """Warn if the network trains on another loss than the twin, at the same θ₀."""
        with quietly(pl_module):
            mute(pl_module)
            network = float(
                self.twin.network_loss(pl_module, batch.inputs, batch.targets)
            )
        # Elsewhere dropout or BatchNorm makes a difference already.
        alike = math.isclose(network, own, rel_tol=_ALIKE)
        if alike and not math.isclose(network, loss, rel_tol=_OTHER):
            rank_zero_warn(
                f"LinearizationMonitor: the training loss of the first batch is "
                f"{loss:.4g}, but that of the linearized twin for the same outputs "
                f"{own:.4g}. Pass the loss that the network trains on as loss_fn, or "
                "the twin learns something else."
            )

    def step(
        self, trainer: Any, pl_module: Any, optimizer: Optimizer, differentiated: bool
    ) -> None:
        """Step the twin as the network is about to.

        Args:
            trainer: Before the step.
            pl_module: Its module.
            optimizer: About to step.
            differentiated: As in `skips_step`.

        Raises:
            UnsupportedModelError: If the optimizer evaluates the loss again.
        """
        self._evaluation.check(trainer, optimizer)
        with isolated_rng():  # clipping in a way of its own may run any code
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            gradients = {
                name: gradient
                for name, gradient in self.twin.gradients.items()
                if id(pl_module.get_parameter(name)) in held
            }
            of_network = held_gradients(pl_module, optimizer)
            if skips_step(trainer, pl_module, of_network, differentiated):
                self.twin.forget_gradients()
                return
            gradients = clipped_by_trainer(trainer, pl_module, optimizer, gradients)
            self.twin.step(pl_module, optimizer, gradients)

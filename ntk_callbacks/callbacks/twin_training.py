"""How a linearized twin follows the steps of a Lightning trainer."""

from typing import Any

from torch.optim import Optimizer

from ntk_callbacks.callbacks.gradients import (
    OneEvaluation,
    clipped_by_trainer,
    overrides,
    skips_step,
)
from ntk_callbacks.callbacks.precautions import mute, refuse_sharded
from ntk_callbacks.callbacks.twin_loss import TwinLoss
from ntk_callbacks.errors import UnsupportedModelError
from ntk_callbacks.guard import isolated_rng, quietly
from ntk_callbacks.instruments.linearization_point import LinearizationPoint
from ntk_callbacks.instruments.linearized_twin import LinearizedTwin
from ntk_callbacks.instruments.predicted_update import held_gradients
from ntk_callbacks.probe import Probe


class TwinTraining:
    """Gives a twin the batches, weights and clipping of the trainer.

    Args:
        twin: Is trained.

    Attributes:
        batch: The one that the network is trained on now, as the trainer gives it.
        alone: Whether the network has no gradient but that of this batch.
        loss: Looks whether the network has that of the twin.
    """

    def __init__(self, twin: LinearizedTwin) -> None:
        self.twin = twin
        self.batch: Any = None
        self.alone = False
        self.loss = TwinLoss(twin)
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
        groups = [group for o in trainer.optimizers for group in o.param_groups]
        held = {id(p) for group in groups for p in group["params"]}
        if held.isdisjoint(map(id, pl_module.parameters())):
            raise UnsupportedModelError(
                f"the optimizer of the trainer holds no parameter of {who}, which is "
                "stepped elsewhere, where a linearized twin cannot follow. Train it by "
                "hand beside the network: `dynamics.linearize` makes one."
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
            self.alone = True

    def accumulate(
        self, trainer: Any, pl_module: Any, point: LinearizationPoint, step: int
    ) -> None:
        """Add the gradient of the twin on the batch.

        Args:
            trainer: After the backward pass of the network.
            pl_module: Its module.
            point: θ₀.
            step: Completed updates.

        Raises:
            ProbeError: If inputs and targets of the batch cannot be told.
            UnsupportedModelError: If its loss is not known, there can be no twin, or
                the parameters are no longer those of θ₀.
        """
        point.refuse_others(dict(pl_module.named_parameters()))
        (optimizer,) = trainer.optimizers
        if not self.twin.expanded:
            with quietly(pl_module):
                mute(pl_module)  # the copy that the twin is made of, too
                self.twin.expand(pl_module, optimizer, point)
        elif not self.twin.follows(optimizer):  # a new one for another `fit`
            self.twin.follow(pl_module, optimizer)
        batch = Probe.from_batch(self.batch)
        weight = 1 / trainer.accumulate_grad_batches
        self.twin.accumulate(pl_module, batch.inputs, batch.targets, weight)
        if self.alone:
            self.loss.compare(trainer, pl_module, batch, weight, step)

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

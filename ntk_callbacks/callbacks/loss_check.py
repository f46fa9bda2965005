"""Whether labels are trained with the loss that a kernel is weighted with."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ntk_callbacks._types import OutputFunction
from ntk_callbacks.callbacks.gradients import gradient_scaler
from ntk_callbacks.callbacks.namespaces import rank_zero_warn
from ntk_callbacks.callbacks.precautions import mute, refuse_sharded
from ntk_callbacks.guard import quietly
from ntk_callbacks.instruments.probe_loss import are_labels, mean_cross_entropy
from ntk_callbacks.layout import widened
from ntk_callbacks.nested import map_tensors
from ntk_callbacks.outputs import call_model
from ntk_callbacks.probe import Probe

# Differences of losses that are the same: labels smoothed by 0.1 make ten times as much
# before any training, and products in TF32 a tenth.
_RELATIVE, _ABSOLUTE = 3e-4, 1e-3


class LossCheck:
    """Holds the loss of one batch against the mean cross-entropy of the same outputs.

    The outputs are found before the training step, in the state that it begins with.
    Two forward passes, once; of a network with dropout, or any other chance, whose
    loss differs from one to the other, nothing can be told.

    Args:
        output_fn: As in `NTKMonitor`.
    """

    def __init__(self, output_fn: OutputFunction | None) -> None:
        self._output_fn, self._done = output_fn, False
        self._expected: float | None = None

    def foresee(self, trainer: Any, pl_module: Any, batch: Any) -> None:
        """Note the cross-entropy of a batch.

        Args:
            trainer: Before the training step.
            pl_module: Its module; left exactly as it was.
            batch: As the trainer gives it.
        """
        self._expected = None
        whole = trainer.world_size == 1 and pl_module.automatic_optimization
        if self._done or not whole:  # layers may wait for other processes
            return
        try:
            refuse_sharded(trainer)
            found = Probe.from_batch(batch)
            with quietly(pl_module), torch.no_grad():
                mute(pl_module)
                with trainer.precision_plugin.forward_context():
                    f, again = (self._outputs(pl_module, found) for _ in range(2))
            y, still = found.targets, torch.equal(f, again)
            if still and y is not None and are_labels(y, f):
                wide = widened(f)
                self._expected = float(mean_cross_entropy(wide, y.to(wide.device)))
        except Exception:  # a batch of another kind than the probe has no such loss
            self._done = True

    def compare(self, trainer: Any, loss: Tensor) -> None:
        """Say once if the training loss is another one.

        Args:
            trainer: After the training step.
            loss: Of the batch, by its weight and the scale of a scaler.
        """
        if self._expected is None:
            return
        expected, self._expected, self._done = self._expected, None, True
        scaler = gradient_scaler(trainer)
        scale = scaler.get_scale() if scaler else 1.0
        found = float(loss) * trainer.accumulate_grad_batches / scale
        relative = max(_RELATIVE, 4 * torch.finfo(loss.dtype).eps)
        same = math.isclose(found, expected, rel_tol=relative, abs_tol=_ABSOLUTE)
        if not same and math.isfinite(expected):
            rank_zero_warn(
                f"NTKMonitor: the training loss of a batch is {found:.4g}, the mean "
                f"cross-entropy of the outputs on it {expected:.4g}. It may have class "
                "weights, label smoothing, a penalty or another reduction, or the step "
                "changes the batch. Sharpness and residual modes are those of the mean "
                "cross-entropy. Pass NTKOptions(loss=…) with what is trained, such as "
                '"cross_entropy_sum", or "cross_entropy_mean" if it is meant.'
            )

    def _outputs(self, pl_module: nn.Module, batch: Probe) -> Tensor:
        # Copies, because a model may overwrite what it is given.
        given = map_tensors(Tensor.clone, batch.inputs)
        return (self._output_fn or call_model)(pl_module, given)

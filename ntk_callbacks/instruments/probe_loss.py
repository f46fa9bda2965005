"""The outputs of a model on a probe, and the loss that they have there."""

import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ntk_callbacks._types import Inputs, OutputFunction
from ntk_callbacks.errors import ProbeError
from ntk_callbacks.functional import ModelFunction
from ntk_callbacks.layout import widened
from ntk_callbacks.outputs import call_model
from ntk_callbacks.probe import Probe

ProbeLoss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""`(outputs (n, ...), targets (n, ...)) -> ()`, called in float64."""

IGNORED = -100  # the label that cross-entropy leaves out


def probe_outputs(
    model: nn.Module, x: Inputs, output_fn: OutputFunction | None = None
) -> Float[Tensor, "n ..."]:
    """Outputs of a model in the shape that it gives them, in float64.

    Args:
        model: In the state it is measured in.
        x: Inputs of a probe.
        output_fn: `(model, x) -> (n, ...)`; default `model(x)`.

    Returns:
        A tensor `(n, ...)` without a graph.
    """
    shapes: list[torch.Size] = []

    def noted(module: nn.Module, batch: Any) -> Tensor:
        outputs = (output_fn or call_model)(module, batch)
        shapes.append(outputs.shape)
        return outputs

    with torch.no_grad():
        function = ModelFunction(model, output_fn=noted)
        flat = function({}, function.prepare(x))
    return widened(flat).view(shapes[-1])


class LossOfProbe:
    """The loss of a probe: one that is given, or cross-entropy where labels ask for it.

    Args:
        loss_fn: `(outputs, targets) -> ()`; None for the mean cross-entropy of logits
            `(n, c)` if the targets are integer labels `(n,)`.
        who: Whom a warning is from.
    """

    def __init__(self, loss_fn: ProbeLoss | None, who: str) -> None:
        self.loss_fn, self._who = loss_fn, who
        self._warned = False

    def of(self, probe: Probe, outputs: Tensor) -> tuple[ProbeLoss | None, Tensor]:
        """The function of outputs and targets, and the targets beside the outputs.

        Args:
            probe: With targets, or without.
            outputs: Of its inputs, in the shape of the model.

        Returns:
            None instead of the function where no loss is known, which is told once;
            the targets, in the dtype of the outputs if they are real, empty if there
            are none.

        Raises:
            ProbeError: If a label is not among the outputs.
        """
        if probe.targets is None:
            self._tell(
                "the probe has no targets, so that only outputs are compared. For the "
                "loss pass Probe(inputs, targets)."
            )
            return None, outputs.new_empty(0)
        y = probe.targets.to(outputs.device)
        y = y.to(outputs.dtype) if y.is_floating_point() else y
        if self.loss_fn is not None:
            return self.loss_fn, y
        if are_labels(y, outputs):
            return mean_cross_entropy, y
        self._tell(
            f"{not_labels(probe.targets, outputs)}, so that the loss is not known and "
            f"only outputs are compared. Pass loss_fn={_suggestion(y, outputs)}."
        )
        return None, y

    def _tell(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"{self._who}: {what}", stacklevel=4)


def mean_cross_entropy(logits: Float[Tensor, "n c"], labels: Tensor) -> Tensor:
    """Mean of −log softmax(f)[label] over the labeled examples."""
    return cross_entropy(logits, labels.long(), ignore_index=IGNORED)


def are_labels(targets: Tensor, outputs: Tensor) -> bool:
    """Whether the targets are class labels of these outputs.

    Args:
        targets: Targets of a probe.
        outputs: `(n, ...)`.

    Returns:
        True for integers `(n,)` and outputs `(n, c)`, c ≥ 2.

    Raises:
        ProbeError: If one of such labels is no class of the outputs.
    """
    if targets.is_floating_point() or targets.ndim != 1:
        return False
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        return False
    known, c = targets[targets != IGNORED], outputs.shape[1]
    if len(known) and not (known.min() >= 0 and known.max() < c):
        raise ProbeError(
            f"labels from {known.min()} to {known.max()} for {c} "
            f"outputs; expected 0 … {c - 1}. Pass the loss_fn that the targets are for."
        )
    return True


def loss_value(loss_fn: ProbeLoss, outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of the probe.

    Args:
        loss_fn: Of outputs and targets.
        outputs: In the shape of the model.
        targets: As the probe has them, in the dtype of the outputs if real.

    Returns:
        A tensor of shape ().

    Raises:
        ValueError: If `loss_fn` returns something else.
    """
    loss = loss_fn(outputs, targets)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"loss_fn returned {found}; expected one number as a "
            "tensor, the mean over the probe for example."
        )
    return loss.reshape(())


def _suggestion(targets: Tensor, outputs: Tensor) -> str:
    """What may be the loss; never one that spreads (n,) over outputs (n, 1)."""
    named, given = "torch.nn.functional", "lambda outputs, targets"
    shape, real = outputs.shape, targets.is_floating_point()
    same = targets.numel() == outputs.numel()
    pixels = not real and targets.shape == (*shape[:1], *shape[2:])
    tokens = not real and targets.shape == shape[:-1]
    if real and targets.shape == shape:
        return f"{named}.mse_loss, or yours"
    if real and same:
        call = "mse_loss(outputs.view_as(targets), targets)"
    elif same:  # yes or no
        name = "binary_cross_entropy_with_logits"
        call = f"{name}(outputs.view_as(targets), targets.to(outputs))"
    elif pixels and not tokens:
        call = "cross_entropy(outputs, targets.long())"
    elif tokens and not pixels:
        call = "cross_entropy(outputs.flatten(0, -2), targets.long().flatten())"
    else:
        return f"{given}: …, the loss that is trained"
    return f"{given}: {named}.{call}, or yours"


def not_labels(targets: Tensor, outputs: Tensor) -> str:
    """Why there is no cross-entropy, for messages."""
    return (
        f"targets {tuple(targets.shape)} of {targets.dtype} for outputs "
        f"{tuple(outputs.shape)} are no labels (n,) of logits (n, c)"
    )

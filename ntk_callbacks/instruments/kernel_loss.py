"""The loss that is trained, as a kernel meets it: gradient, curvature and scale."""

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ntk_callbacks._types import Kernel
from ntk_callbacks.dynamics.gauss_newton import curvature_factor, loss_weighted_kernel
from ntk_callbacks.dynamics.losses import LossName
from ntk_callbacks.errors import ProbeError
from ntk_callbacks.layout import widened
from ntk_callbacks.theory.scales import Loss, loss_scale

_IGNORED = -100  # the label that cross-entropy leaves out


@dataclass(frozen=True, slots=True)
class LossTerms:
    """A loss s Σ ℓ over the labeled examples of the probe.

    Attributes:
        kind: ℓ: `"mse"`, ½(f − y)², or `"cross_entropy"`, −log softmax(f)[label].
        scale: s, 1/n for a mean over the examples.
        outputs: f of the labeled examples, float64.
        residual: ∂ℓ/∂f: f − y, or softmax(f) − one-hot.
        labeled: Indices of those examples.
    """

    kind: LossName
    scale: float
    outputs: Float[Tensor, "n c"]
    residual: Float[Tensor, "n c"]
    labeled: Int[Tensor, " n"]

    def restricted(self, ntk: Kernel) -> Kernel:
        """The kernel of the labeled examples."""
        index = self.labeled.to(ntk.device)
        return ntk[index][:, index]

    def weighted(self, ntk: Kernel) -> Float[Tensor, "m m"]:
        """Bᵀ Θ B with B Bᵀ the Hessian of ℓ, without s; see `loss_weighted_kernel`."""
        kernel = widened(self.restricted(ntk))
        outputs = self.outputs.to(kernel.device)
        return loss_weighted_kernel(kernel, outputs, loss=self.kind)

    def curved(self, change: Float[Tensor, "N c"]) -> Float[Tensor, " m"]:
        """H times a change of all outputs: how it moves the residual, without s."""
        wide = widened(change[self.labeled.to(change.device)])
        factor = curvature_factor(self.outputs.to(wide), loss=self.kind)
        return (factor @ (factor.mT @ wide[..., None])).reshape(-1)


class LossOfKernel:
    """The loss that is trained: the one that is named, or that the targets ask for.

    Args:
        loss: Its name; None to tell it from the targets.

    Attributes:
        guessed: Whether labels were taken for those of the mean cross-entropy.
    """

    def __init__(self, loss: Loss | None) -> None:
        self._name = loss
        self.guessed = self._told = False

    def of(self, f: Float[Tensor, "n c"], targets: Tensor | None) -> LossTerms | None:
        """Its terms on the probe, as `loss_terms`; says once if they are a guess.

        Labels are trained with cross-entropy nearly always, and `NTKMonitor` holds the
        loss of a batch against it. Real targets tell neither the loss nor its scale.

        Args:
            f: Outputs.
            targets: Of the probe.

        Returns:
            None if no loss is known.

        Raises:
            ProbeError: If the targets are none for the loss that was named.
        """
        terms = loss_terms(f, targets, self._name)
        if terms is None or self._name is not None:
            return terms
        self.guessed = terms.kind == "cross_entropy"
        if not (self.guessed or self._told):
            self._told = True
            warnings.warn(
                "NTKMonitor: real targets do not tell the loss that is trained. "
                "Sharpness and residual modes are those of 1/(2n) Σ (f − y)², and "
                "wrong for any other. Pass NTKOptions(loss=…): "
                '"mse_mean" for MSELoss(), "half_mean" if this is the one.',
                stacklevel=2,
            )
        return terms


def loss_terms(
    f: Float[Tensor, "n c"], targets: Tensor | None, loss: Loss | None
) -> LossTerms | None:
    """The terms of a loss on the probe.

    Args:
        f: Outputs.
        targets: Of the probe.
        loss: Its name; None to tell it from the targets.

    Returns:
        None if no loss was named and the targets do not tell one: there are none, or
        they are neither labels of the outputs nor real numbers of their shape.

    Raises:
        ProbeError: If the targets are none for the loss that was named.
    """
    wide = widened(f.detach())
    n, c = wide.shape
    name: Loss = loss or _usual(targets)
    kind: LossName = "cross_entropy" if name.startswith("cross_entropy") else "mse"
    wrong = _mismatch(kind, targets, n, c)
    if targets is None or wrong:
        if loss is None:
            return None
        raise ProbeError(
            f"NTKMonitor: loss={loss!r} and outputs {(n, c)}, but the probe has "
            f"{wrong}. Pass Probe(inputs, targets) of this loss, or another loss."
        )
    if kind == "mse":
        y = widened(targets.detach()).to(wide.device).reshape(n, c)
        return LossTerms(
            *(kind, loss_scale(name, n=n, c=c), wide, wide - y, torch.arange(n))
        )
    labels = targets.reshape(n).to(wide.device).long()
    labeled = (labels != _IGNORED).nonzero()[:, 0]
    wide, labels = wide[labeled], labels[labeled]
    residual = wide.softmax(-1) - torch.eye(c).to(wide)[labels]
    scale = loss_scale(name, n=len(labels), c=c)
    return LossTerms(kind, scale, wide, residual, labeled)


def _usual(targets: Tensor | None) -> Loss:
    real = targets is None or targets.is_floating_point()
    return "half_mean" if real else "cross_entropy_mean"


def _mismatch(kind: LossName, targets: Tensor | None, n: int, c: int) -> str:
    """What targets these are, if they are none for the loss; else nothing."""
    if targets is None:
        return "no targets"
    found = f"targets {tuple(targets.shape)} of {targets.dtype}"
    if kind == "mse":
        fit = targets.is_floating_point() and targets.numel() == n * c
        return "" if fit else found
    if targets.is_floating_point() or targets.numel() != n or c < 2:
        return found
    known = targets[targets != _IGNORED]
    if not len(known):
        return "no labeled example"
    low, high = int(known.min()), int(known.max())
    return "" if low >= 0 and high < c else f"labels from {low} to {high}"

"""Kernel regression with the kernel of a network, beside the network itself."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from ntk_callbacks._types import Inputs
from ntk_callbacks.dynamics.regression import kernel_regression
from ntk_callbacks.errors import ProbeError
from ntk_callbacks.instruments.probe_loss import IGNORED, are_labels
from ntk_callbacks.layout import widened
from ntk_callbacks.nested import leaves, replace_leaves
from ntk_callbacks.probe import Probe


def kernel_accuracy(
    ntk: Float[Tensor, "m m"],
    labels: Int[Tensor, " n"],
    held_out: Int[Tensor, " n_held_out"],
    c: int,
    *,
    ridge: float,
) -> float:
    """Accuracy on held-out examples of kernel regression from the others.

    argmax over the classes of Θ(held out, probe) (Θ(probe, probe) + ρ·1)⁻¹ Y, with Y
    the one-hot labels less 1/c (which moves no argmax). The ridge is in units of the
    mean eigenvalue, ρ = ridge·tr Θ(probe, probe)/n, so that it means the same for a
    kernel that has grown.

    Args:
        ntk: Traced kernel of the n examples of the probe, then the held-out ones.
        labels: Of the probe; −100 for examples to leave out.
        held_out: Labels of the held-out examples; likewise.
        c: Classes.
        ridge: ≥ 0, relative.

    Returns:
        Share in [0, 1] of the labeled held-out examples; NaN if there is none, on
        either side.

    Example:
        >>> ntk = torch.eye(4) + torch.eye(4).roll(2, 0)  # 2 is like 0, 3 like 1
        >>> labels = torch.tensor([0, 1])
        >>> kernel_accuracy(ntk, labels, labels, 2, ridge=0.0)
        1.0

    References:
        Long 2021, arXiv:2105.10585 (after kernel); Fort et al. 2020, arXiv:2010.15110.
    """
    known = (labels != IGNORED).nonzero()[:, 0]
    asked = (held_out != IGNORED).nonzero()[:, 0]
    if not (len(known) and len(asked)):
        return float("nan")
    ntk = widened(ntk)
    theta, across = ntk[known][:, known], ntk[len(labels) + asked][:, known]
    y = one_hot(labels[known].long(), c).to(ntk) - 1 / c
    scale = float(theta.diagonal().mean())
    predicted = kernel_regression(theta, y, across, ridge=ridge * scale)
    return accuracy(predicted, held_out[asked])


def accuracy(outputs: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> float:
    """Share of the labeled examples whose largest output is that of their label.

    Args:
        outputs: Logits, or other scores.
        labels: −100 for examples to leave out.

    Returns:
        A number in [0, 1]; NaN without a label, or if an output is none itself.

    Example:
        >>> accuracy(torch.eye(2), torch.tensor([0, 0]))
        0.5
    """
    known = labels != IGNORED
    if not bool(outputs[known].isfinite().all()):
        return float("nan")
    right = outputs[known].argmax(1) == labels[known].to(outputs.device)
    return float(right.double().mean())


def joined(first: Inputs, second: Inputs) -> Inputs:
    """The examples of two batches of the same structure, one after the other.

    Args:
        first: The batch whose structure it gets.
        second: The other.

    Returns:
        A batch.

    Raises:
        ProbeError: If the structures or the shapes of an example differ.

    Example:
        >>> joined({"x": torch.zeros(1, 2)}, {"x": torch.ones(2, 2)})["x"].shape
        torch.Size([3, 2])
    """
    pairs = list(zip(leaves(first), leaves(second), strict=False))
    fits = len(leaves(first)) == len(leaves(second))
    if not fits or any(a.shape[1:] != b.shape[1:] for a, b in pairs):
        shapes = [[tuple(t.shape) for t in leaves(x)] for x in (first, second)]
        raise ProbeError(
            f"LinearizationMonitor: the probe holds {shapes[0]}, the held-out probe "
            f"{shapes[1]}; a kernel between them needs examples of the same shape."
        )
    # On one device and in one dtype: a probe that was drawn may sit elsewhere.
    tensors = [torch.cat([a.detach(), b.detach().to(a)]) for a, b in pairs]
    batch: Inputs = replace_leaves(first, tensors)
    return batch


def checked_labels(what: str, probe: Probe, outputs: Tensor) -> Tensor:
    """The labels of a probe, on the device of the outputs.

    Args:
        what: Which probe, for the message.
        probe: Should have labels of these outputs.
        outputs: `(n, c)`.

    Returns:
        Integers `(n,)`.

    Raises:
        ProbeError: If there are none.
    """
    if probe.targets is None or not are_labels(probe.targets, outputs):
        found = "none" if probe.targets is None else tuple(probe.targets.shape)
        raise ProbeError(
            f"LinearizationMonitor: held_out compares classifiers, and {what} has "
            f"targets {found} for outputs {tuple(outputs.shape)}; expected integer "
            "labels (n,) of logits (n, c), c ≥ 2. Leave held_out away, or pass "
            "Probe(inputs, labels)."
        )
    return probe.targets.to(outputs.device)

"""Does the output of an example depend on its neighbors in the batch, or on chance?"""

import warnings

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_callbacks._types import Inputs
from ntk_callbacks.errors import UnsupportedModelError
from ntk_callbacks.functional import ModelFunction
from ntk_callbacks.nested import batch_size, examples


def refuse_randomness(function: ModelFunction, x: Inputs) -> None:
    """Raise if two forward passes on the same inputs disagree.

    Args:
        function: The model as it is measured.
        x: A batch.

    Raises:
        UnsupportedModelError: If the outputs differ by more than round-off.
    """
    first, second = forward(function, x), forward(function, x)
    if not _close(first, second):
        gap = (first - second).abs().max().item()
        raise UnsupportedModelError(
            "two forward passes on the same inputs differ by up to "
            f"{gap:.3g}: the model draws random numbers even now, so its kernel is "
            'not defined. Measure with mode="eval", or set the drop probabilities to '
            "zero in what `output_fn` calls."
        )


def is_coupled(function: ModelFunction, x: Inputs) -> bool:
    """Whether the output of an example changes when it is run without its neighbors.

    True for BatchNorm on batch statistics, batches that are one graph, contrastive
    outputs. Their kernel needs the joint batch. An example that cannot be run alone
    counts as coupled: differentiating jointly is right in either case.

    Args:
        function: The model as it is measured.
        x: A batch.

    Returns:
        Whether the first or the last example depends on the rest of the batch.
    """
    n = batch_size(x)
    if n == 1:
        return False
    joint = forward(function, x)
    for i in (0, n - 1):
        try:
            alone = forward(function, examples(x, i, i + 1))
        except Exception:  # whatever a model raises on a batch of one
            return True
        if not _close(alone, joint[i : i + 1]):
            return True
    return False


def forward(function: ModelFunction, x: Inputs) -> Float[Tensor, "n c"]:
    """Outputs without a graph, also where `output_fn` takes derivatives itself."""
    with warnings.catch_warnings():
        # Reentrant checkpointing warns where gradients are off.
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
        try:
            with torch.no_grad():
                return function(function.params, x).detach()
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
        return function(function.params, x).detach()


def _close(first: Tensor, second: Tensor) -> bool:
    """Equal up to the round-off that another batch size or thread order causes."""
    if first.shape != second.shape:
        return False
    if first.is_meta:
        return True
    scale = torch.nan_to_num(second.abs(), nan=0.0, posinf=0.0).max()
    tolerance = float(scale) * torch.finfo(first.dtype).eps ** 0.5
    return torch.allclose(first, second, rtol=0.0, atol=tolerance, equal_nan=True)

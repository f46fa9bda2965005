"""What studies learn from: scikit-learn's digits as tensors, split and balanced."""

import torch
from torch import Tensor

from ntk_callbacks.experiments.data import Digits


def digits(
    n: int,
    *,
    held_out: bool = False,
    classes: int = 10,
    images: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """The first n digits, equally many of each class, always the same.

    Args:
        n: Examples.
        held_out: Take them from the test split, of 359, not the training split of 1438.
        classes: Only the digits below this.
        images: Keep the shape (1, 8, 8) of an input; else it is flattened.
        device: Where to put them.
        dtype: Of the inputs, whose pixels have mean 0 and variance 1.

    Returns:
        Inputs (n, 64) or (n, 1, 8, 8), and labels (n,).

    Raises:
        ValueError: If there are not so many examples.

    Example:
        >>> x, labels = digits(20)
        >>> x.shape, labels.bincount().tolist()
        (torch.Size([20, 64]), [2, 2, 2, 2, 2, 2, 2, 2, 2, 2])
    """
    data = Digits()
    loader = data.val_dataloader() if held_out else data.train_dataloader()
    x, labels = loader.dataset.tensors  # type: ignore[attr-defined]
    shares = [n // classes + (k < n % classes) for k in range(classes)]
    places = [(labels == k).nonzero()[:, 0] for k in range(classes)]
    if any(len(p) < share for p, share in zip(places, shares, strict=True)):
        most = classes * min(len(p) for p in places)
        raise ValueError(f"digits: there are no {n} examples, at most {most}.")
    chosen = torch.cat([p[:share] for p, share in zip(places, shares, strict=True)])
    chosen = chosen.sort().values
    x = x[chosen] if images else x[chosen].flatten(1)
    return x.to(device, dtype), labels[chosen].to(device)


def centered_one_hot(labels: Tensor, classes: int, like: Tensor) -> Tensor:
    """Targets of the squared error: 1 − 1/classes for the class, −1/classes elsewhere.

    Args:
        labels: Classes (n,).
        classes: How many there are.
        like: Dtype and device of the result.

    Returns:
        Tensor (n, classes), whose rows add up to 0.

    Example:
        >>> centered_one_hot(torch.tensor([1]), 2, torch.zeros(1))
        tensor([[-0.5000,  0.5000]])
    """
    one_hot = torch.nn.functional.one_hot(labels, classes).to(like)
    return one_hot - 1 / classes

"""What a kernel is aligned with: another kernel, the targets, single outputs."""

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from ntk_callbacks.metrics.checks import real, square
from ntk_callbacks.metrics.magnitude import frobenius_norm, rescaled


def cka(
    kernel: Float[Tensor, "n n"], reference: Float[Tensor, "n n"]
) -> Float[Tensor, ""]:
    """Centered kernel alignment, the cosine ⟨HKH, HLH⟩_F / (‖HKH‖ ‖HLH‖).

    H = 1 − 𝟙𝟙ᵀ/n removes the mean over the examples on both sides.

    Args:
        kernel: K, n×n.
        reference: L, n×n.

    Returns:
        Value in [0, 1] for two kernels (positive semi-definite); NaN if either is
        constant over the examples.

    Raises:
        ValueError: If the kernels are not of the same n examples on both sides.

    Example:
        >>> cka(torch.eye(3), 2 * torch.eye(3))
        tensor(1.)

    References:
        Cortes, Mohri, Rostamizadeh 2012, arXiv:1203.0550.
    """
    if kernel.shape != reference.shape:
        raise ValueError(
            f"cka: the kernels have shapes {tuple(kernel.shape)} and "
            f"{tuple(reference.shape)}; they need the same examples."
        )
    first, second = (
        rescaled(centered(rescaled(square("cka", side))))
        for side in (kernel, reference)
    )
    lengths = frobenius_norm(first) * frobenius_norm(second)
    return ((first * second).sum() / lengths).clamp(-1.0, 1.0)


def centered(kernel: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Kernel with the mean over the examples removed on both sides, HKH."""
    # First what all have in common: the means of equal entries leave round-off.
    rows = kernel - kernel[:1]
    differences = rows - rows[:, :1]
    columns = differences - differences.mean(0, keepdim=True)
    return columns - columns.mean(1, keepdim=True)


def target_alignment(
    kernel: Float[Tensor, "n n"], targets: Shaped[Tensor, "n ..."]
) -> Float[Tensor, ""]:
    """Centered alignment of a kernel with the targets, `cka(K, Y Yᵀ)`.

    Rises when the kernel learns to tell the classes apart.

    Args:
        kernel: Traced kernel, n×n.
        targets: Class indices `(n,)` (Y is then one-hot), or real targets `(n, ...)`.

    Returns:
        Value in [0, 1]; NaN if all targets are equal.

    Raises:
        ValueError: If the kernel is not n×n, or the number of targets not n.

    Example:
        >>> blocks = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2))
        >>> target_alignment(blocks, torch.tensor([0, 0, 1, 1]))
        tensor(1.)

    References:
        Baratin et al. 2021, arXiv:2008.00938; Atanasov, Bordelon, Pehlevan 2022,
        arXiv:2111.00034.
    """
    kernel = square("target_alignment", kernel)
    if targets.shape[:1] != kernel.shape[:1]:
        raise ValueError(
            f"target_alignment: targets of shape {tuple(targets.shape)} for a kernel "
            f"of {len(kernel)} examples; expected one for each."
        )
    rows = targets.reshape(len(targets), targets[:1].numel())
    if targets.is_floating_point() or targets.is_complex():
        y = real("target_alignment", rows)
        y = y.to(torch.promote_types(y.dtype, kernel.dtype))
        # Before the product: squares of a large mean leave nothing of what differs.
        y = y - y[:1]
        y = rescaled(y - y.mean(0)).to(kernel)
        return cka(kernel, y @ y.mT)
    same = (rows[:, None] == rows[None]).all(-1)  # Y Yᵀ of one-hot rows
    return cka(kernel, same.to(kernel))


def off_diagonal_share(ntk: Float[Tensor, "n1 n2 c c"]) -> Float[Tensor, ""]:
    """Share of the kernel that couples different outputs.

    Σ over k ≠ l of Θ[i, j, k, l]² divided by the sum over all k, l. It is 0 for an
    infinitely wide network, whose kernel is a traced kernel times the identity.

    Args:
        ntk: Kernel with both output axes.

    Returns:
        Value in [0, 1]; 0 for a single output, NaN if the kernel is zero.

    Raises:
        ValueError: If the kernel has other axes.

    Example:
        >>> off_diagonal_share(torch.eye(2).expand(3, 3, 2, 2))
        tensor(0.)
    """
    if ntk.ndim != 4 or ntk.shape[2] != ntk.shape[3]:
        raise ValueError(
            f"off_diagonal_share: a kernel of shape {tuple(ntk.shape)}; expected "
            '(n1, n2, c, c), with both output axes. Pass one of outputs="full".'
        )
    squares = rescaled(real("off_diagonal_share", ntk)).square()
    total = squares.sum()
    # Not total − diagonal: of nearly diagonal kernels that leaves only round-off.
    torch.diagonal(squares, dim1=2, dim2=3).zero_()
    return squares.sum() / total


def class_blocks(
    kernel: Float[Tensor, "n n"], classes: Int[Tensor, "..."]
) -> Float[Tensor, "k k"]:
    """Mean of the kernel over the pairs of examples of two classes.

    Pairs of an example with itself are left out: the diagonal of a kernel is large for
    every class, and the fewer the examples the more it would count.

    Args:
        kernel: Traced kernel, n×n.
        classes: Class of each example, `(n,)` or `(n, 1)`.

    Returns:
        k×k for the k classes that occur, in ascending order; NaN on the diagonal for a
        class of one example.

    Raises:
        ValueError: If the kernel is not n×n, or the number of classes not n.

    Example:
        >>> kernel = torch.tensor([[9.0, 2.0, 1.0], [2.0, 9.0, 0.0], [1.0, 0.0, 9.0]])
        >>> class_blocks(kernel, torch.tensor([0, 0, 5]))
        tensor([[2.0000, 0.5000],
                [0.5000,    nan]])

    References:
        Shan, Bordelon 2021, arXiv:2105.14301 (kernels that specialize to classes).
    """
    kernel = square("class_blocks", kernel)
    member = _membership("class_blocks", kernel, classes)
    # Not subtracted from the sums: a large diagonal leaves only round-off.
    itself = torch.eye(len(kernel), dtype=torch.bool, device=kernel.device)
    others = kernel.masked_fill(itself, 0)
    sums = member.mT @ others @ member
    sizes = member.sum(0)
    return sums / (torch.outer(sizes, sizes) - torch.diag(sizes))


def within_between_ratio(
    kernel: Float[Tensor, "n n"], classes: Int[Tensor, "..."]
) -> Float[Tensor, ""]:
    """Mean kernel within classes over that between classes.

    Over all pairs of two different examples of the same class, and all pairs of
    examples of different classes.

    Args:
        kernel: Traced kernel, n×n.
        classes: Class of each example, `(n,)` or `(n, 1)`.

    Returns:
        1 if the kernel does not know the classes, above if examples of a class share
        more; it changes its sign with the mean between classes. NaN if all examples
        have one class, or all different ones.

    Raises:
        ValueError: If the kernel is not n×n, or the number of classes not n.

    Example:
        >>> kernel = torch.tensor([[9.0, 2.0, 1.0], [2.0, 9.0, 0.0], [1.0, 0.0, 9.0]])
        >>> within_between_ratio(kernel, torch.tensor([0, 0, 5]))
        tensor(4.)
    """
    kernel = square("within_between_ratio", kernel)
    member = _membership("within_between_ratio", kernel, classes)
    same = member @ member.mT
    other = 1 - same
    same = same - torch.eye(len(same)).to(same)
    within = (kernel * same).sum() / same.sum()
    return within / ((kernel * other).sum() / other.sum())


def _membership(who: str, kernel: Tensor, classes: Tensor) -> Tensor:
    """One-hot rows (n, k) over the classes that occur."""
    if classes.shape[:1] != kernel.shape[:1] or classes.numel() != len(kernel):
        raise ValueError(
            f"{who}: classes of shape {tuple(classes.shape)} for a kernel of "
            f"{len(kernel)} examples; expected one for each."
        )
    labels = classes.to(kernel.device).reshape(-1)
    found, index = torch.unique(labels, return_inverse=True)
    return torch.eye(len(found)).to(kernel)[index]

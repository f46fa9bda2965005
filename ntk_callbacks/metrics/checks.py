"""What every metric asks of the tensors it is given, with one refusal for each."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


def real(who: str, values: Shaped[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The same numbers in float32 at least: half precision has no room for sums.

    Args:
        who: The function that is called, for the message.
        values: Floating-point numbers or integers.

    Returns:
        A tensor of float32 or float64; `values` itself where it is one.

    Raises:
        ValueError: If the numbers are complex, whose imaginary parts would be dropped.
    """
    if values.is_complex():
        raise ValueError(
            f"{who}: numbers of {values.dtype}; expected real ones. Pass the real and "
            "the imaginary parts as two outputs, torch.view_as_real(outputs)."
        )
    return values.to(torch.promote_types(values.dtype, torch.float32))


def one_axis(who: str, values: Shaped[Tensor, "..."]) -> Float[Tensor, " r"]:
    """The values of one spectrum; a matrix in their place would give some number, too.

    Args:
        who: As in `real`.
        values: Of one axis.

    Returns:
        As `real`.

    Raises:
        ValueError: If there is no value, or there is not just one axis.
    """
    if values.ndim != 1:
        raise ValueError(
            f"{who}: values of shape {tuple(values.shape)}; expected one axis, the "
            "spectrum of one matrix. Of a kernel pass "
            "torch.linalg.eigvalsh(as_matrix(ntk))."
        )
    return not_empty(who, real(who, values))


def not_empty(who: str, values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The tensor itself; a ValueError if there is nothing in it."""
    if values.numel() == 0:
        raise ValueError(f"{who}: a spectrum needs at least one value, got none.")
    return values


def square(who: str, kernel: Shaped[Tensor, "..."]) -> Float[Tensor, "n n"]:
    """A kernel with one row and one column for each example.

    Args:
        who: As in `real`.
        kernel: n×n.

    Returns:
        As `real`.

    Raises:
        ValueError: If it has other axes.
    """
    if kernel.ndim != 2 or kernel.shape[0] != kernel.shape[1]:
        raise ValueError(
            f"{who}: a kernel of shape {tuple(kernel.shape)}; expected (n, n), the "
            "same examples on both sides and no outputs. Pass the traced kernel, "
            'empirical_ntk(model, x, outputs="trace").'
        )
    return real(who, kernel)

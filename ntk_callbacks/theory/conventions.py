"""The same kernel in the layouts of others.

Here a kernel is Θ[i, j, k, l] = Σ_p ∂f_k(xᵢ)/∂θ_p ∂f_l(xⱼ)/∂θ_p, `(n1, n2, c, c)`, and
a traced one the mean (1/c) Σₖ Θ[:, :, k, k].
"""

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_callbacks._types import Kernel
from ntk_callbacks.theory.learning import check_choice

Recipe: TypeAlias = Literal["full", "trace", "diagonal"]
"""The `compute` argument of the torch.func recipe."""


def to_neural_tangents(
    ntk: Float[Tensor, "n1 n2 c c"],
    output_shape: Sequence[int] | None = None,
    *,
    trace_axes: Sequence[int] = (-1,),
    diagonal_axes: Sequence[int] = (),
) -> Tensor:
    """A kernel as `nt.empirical_ntk_fn` returns it, in layout and normalization.

    There every axis of the outputs stands twice, side by side: outputs (n, h, c) have
    kernels (n1, n2, h, h, c, c). `trace_axes` are replaced by the mean over their
    diagonal (not by the trace), `diagonal_axes` by their diagonal.

    Args:
        ntk: A full kernel, its c the flattened outputs of one example.
        output_shape: Shape of the outputs of one example; None for (c,).
        trace_axes: Axes of the outputs, the batch being axis 0, as there.
        diagonal_axes: Axes of the outputs, as there.

    Returns:
        A tensor of the dtype of the kernel.

    Raises:
        ValueError: If shapes or axes do not fit.

    Example:
        >>> ntk = torch.tensor([[[[3.0, 1.0], [1.0, 5.0]]]])
        >>> to_neural_tangents(ntk)
        tensor([[4.]])

    References:
        Novak et al. 2020, arXiv:1912.02803 (neural-tangents 0.6.5).
    """
    _check_full(ntk)
    shape = _output_shape(ntk, output_shape)
    axes = len(shape)
    trace = _axes("trace_axes", trace_axes, axes)
    diagonal = _axes("diagonal_axes", diagonal_axes, axes)
    if trace & diagonal:
        raise ValueError(
            f"trace_axes={tuple(trace_axes)} and diagonal_axes={tuple(diagonal_axes)} "
            "name an axis twice; expected different ones."
        )
    kernel = ntk.reshape(*ntk.shape[:2], *shape, *shape)
    # A letter for every axis; the second one of a pair is the first where it is gone.
    first = [chr(ord("a") + axis) for axis in range(axes)]
    second = [
        letter if axis in trace | diagonal else letter.upper()
        for axis, letter in enumerate(first)
    ]
    kept = [
        first[axis] if axis in diagonal else first[axis] + second[axis]
        for axis in range(axes)
        if axis not in trace
    ]
    equation = f"xy{''.join(first + second)}->xy{''.join(kept)}"
    traced = math.prod(shape[axis] for axis in trace)
    return torch.einsum(equation, kernel) / traced


def from_neural_tangents(
    kernel: Tensor, output_shape: Sequence[int], *, trace_axes: Sequence[int] = (-1,)
) -> Kernel:
    """A kernel of neural-tangents as one of this package.

    Args:
        kernel: With `diagonal_axes=()`, as a tensor.
        output_shape: Shape of the outputs of one example.
        trace_axes: As the kernel was computed with: none, or all axes of the outputs.

    Returns:
        `(n1, n2, c, c)` without trace axes, else the traced `(n1, n2)`.

    Raises:
        ValueError: If only some of the axes are traced, or shapes do not fit.

    Example:
        Outputs of shape (2, 3) have kernels with pairs of equal axes there:

        >>> kernel = torch.ones(4, 5, 2, 2, 3, 3)
        >>> from_neural_tangents(kernel, (2, 3), trace_axes=()).shape
        torch.Size([4, 5, 6, 6])
    """
    shape = tuple(output_shape)
    trace = _axes("trace_axes", trace_axes, len(shape))
    if trace and len(trace) < len(shape):
        raise ValueError(
            f"from_neural_tangents: trace_axes={tuple(trace_axes)} of outputs {shape}; "
            "expected none or all: a kernel that is traced over some of its outputs "
            "has no counterpart here."
        )
    pairs = () if trace else tuple(size for size in shape for _ in range(2))
    if tuple(kernel.shape[2:]) != pairs:
        raise ValueError(
            f"from_neural_tangents: a kernel of shape {tuple(kernel.shape)}; expected "
            f"(n1, n2) followed by {pairs} for outputs {shape}."
        )
    if trace:
        return kernel
    left, right = range(2, 2 + len(pairs), 2), range(3, 3 + len(pairs), 2)
    c = math.prod(shape)
    return kernel.permute(0, 1, *left, *right).reshape(*kernel.shape[:2], c, c)


def to_torch_func(ntk: Float[Tensor, "n1 n2 c c"], compute: Recipe = "full") -> Kernel:
    """A kernel as the torch.func recipe ("Neural Tangent Kernels") returns it.

    The same layout; but its `"trace"` is the sum over outputs, c times ours.

    Args:
        ntk: A full kernel.
        compute: The recipe's argument.

    Returns:
        `(n1, n2, c, c)`, `(n1, n2)` or `(n1, n2, c)`.

    Raises:
        ValueError: If `compute` is none of these.

    Example:
        >>> to_torch_func(torch.eye(2).expand(3, 3, 2, 2), "trace")[0, 0]
        tensor(2.)
    """
    check_choice(Recipe, compute=compute)
    _check_full(ntk)
    if compute == "full":
        return ntk
    diagonal = ntk.diagonal(dim1=2, dim2=3)
    return diagonal.sum(2) if compute == "trace" else diagonal.clone()


def from_torch_func(kernel: Kernel, compute: Recipe, *, c: int) -> Kernel:
    """A kernel of the torch.func recipe as one of this package.

    Args:
        kernel: What the recipe gave.
        compute: Its argument.
        c: Outputs of one example.

    Returns:
        `(n1, n2, c, c)`, the traced `(n1, n2)` or the diagonal `(n1, n2, c)`.

    Raises:
        ValueError: If `compute` is none of these, or the shape does not fit it.

    Example:
        >>> from_torch_func(torch.tensor([[6.0]]), "trace", c=2)
        tensor([[3.]])
    """
    check_choice(Recipe, compute=compute)
    expected = {"full": (c, c), "trace": (), "diagonal": (c,)}[compute]
    if c < 1 or kernel.ndim < 2 or tuple(kernel.shape[2:]) != expected:
        raise ValueError(
            f"from_torch_func: a kernel of shape {tuple(kernel.shape)} for "
            f"compute={compute!r} and c={c}; expected (n1, n2) followed by {expected}."
        )
    return kernel / c if compute == "trace" else kernel


def _check_full(ntk: Tensor) -> None:
    if ntk.ndim != 4 or ntk.shape[2] != ntk.shape[3]:
        raise ValueError(
            f"a kernel of shape {tuple(ntk.shape)}, expected full, (n1, n2, c, c)."
        )


def _output_shape(
    ntk: Float[Tensor, "n1 n2 c c"], output_shape: Sequence[int] | None
) -> tuple[int, ...]:
    shape = (ntk.shape[2],) if output_shape is None else tuple(output_shape)
    if math.prod(shape) != ntk.shape[2]:
        raise ValueError(
            f"output_shape={shape} has {math.prod(shape)} entries; expected the "
            f"{ntk.shape[2]} outputs of the kernel of shape {tuple(ntk.shape)}."
        )
    return shape


def _axes(argument: str, axes: Sequence[int], count: int) -> set[int]:
    """Axes of the outputs of one example, of which the batch took number 0."""
    for axis in axes:
        if not (1 <= axis <= count or -count <= axis <= -1):
            raise ValueError(
                f"{argument}={tuple(axes)}; expected axes 1 to {count} of outputs "
                f"with the batch as axis 0, or -{count} to -1."
            )
    return {axis - 1 if axis > 0 else axis + count for axis in axes}

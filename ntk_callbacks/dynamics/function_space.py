"""Outputs as columns and kernels as matrices that act on them, checked once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_callbacks.layout import as_matrix, widened

Times: TypeAlias = float | Sequence[float] | Tensor
"""One moment, or several: the results then have a leading axis."""


@dataclass(frozen=True, slots=True)
class Trajectory:
    """Outputs along training, in float64.

    Attributes:
        train: Outputs on the training set, of the shape of `f0`; with a leading axis
            if several times or steps were asked for.
        test: The same for `f0_test`; None if no test kernel was given.

    Example:
        >>> from ntk_callbacks.dynamics import gradient_flow
        >>> end = gradient_flow(torch.eye(2), torch.zeros(2), torch.ones(2), math.inf)
        >>> end.train, end.test
        (tensor([1., 1.], dtype=torch.float64), None)
    """

    train: Float[Tensor, "..."]
    test: Float[Tensor, "..."] | None


@dataclass(frozen=True, slots=True)
class FunctionSpace:
    """A training set and what is watched beside it, as a kernel sees them.

    A kernel with output axes, or a matrix with one row for each number in `f0`, acts on
    one column of m = n·c numbers; an (n, n) kernel acts on each of the c outputs alike,
    k = c columns of m = n numbers.

    Attributes:
        ntk: Θ, (m, m), float64 and symmetric.
        f0: Outputs before training, (m, k).
        ntk_test: Θ(test, train), (q, m); q = 0 without a test set.
        f0_test: Outputs on the test set before training, (q, k).
        shape: Shape of the outputs as they were given.
        test_shape: The same for the test set; None without one.
        precision: Round-off unit of the dtype the kernel came in.
    """

    ntk: Tensor
    f0: Tensor
    ntk_test: Tensor
    f0_test: Tensor
    shape: torch.Size
    test_shape: torch.Size | None
    precision: float

    @classmethod
    def of(
        cls,
        who: str,
        ntk: Tensor,
        f0: Tensor,
        ntk_test: Tensor | None = None,
        f0_test: Tensor | None = None,
    ) -> "FunctionSpace":
        """Check the arguments of `who` and lay them out."""
        matrix = kernel_matrix(who, ntk)
        m = len(matrix)
        shared = ntk.ndim == 2 and f0.ndim > 1 and len(f0) == m
        if not (f0.numel() == m or shared):
            raise ValueError(
                f"{who}: ntk has shape {tuple(ntk.shape)}, the outputs "
                f"{tuple(f0.shape)}; expected (n, n, c, c) or (n·c, n·c) with outputs "
                "(n, c), or (n, n) for outputs that share one kernel."
            )
        f0_columns = finite(who, "f0", f0).to(matrix.device).reshape(m, -1)
        k = f0_columns.shape[1]
        if (ntk_test is None) != (f0_test is None):
            raise ValueError(
                f"{who}: ntk_test and f0_test belong together, and only one was "
                "given. For a function that starts at zero pass f0_test=torch.zeros."
            )
        if ntk_test is None or f0_test is None:
            cross, start = matrix.new_zeros(0, m), matrix.new_zeros(0, k)
        else:
            cross = as_matrix(finite(who, "ntk_test", ntk_test)).to(matrix.device)
            if cross.shape[1] != m or f0_test.numel() != cross.shape[0] * k:
                raise ValueError(
                    f"{who}: ntk_test has shape {tuple(ntk_test.shape)} with f0_test "
                    f"{tuple(f0_test.shape)}, for ntk {tuple(ntk.shape)} with f0 "
                    f"{tuple(f0.shape)}; expected Θ(test, train) with {m} columns as a "
                    f"matrix, and {k} number(s) of f0_test for each of its rows."
                )
            start = finite(who, "f0_test", f0_test).to(matrix.device)
            start = start.reshape(len(cross), k)
        return cls(
            matrix,
            f0_columns,
            cross,
            start,
            f0.shape,
            None if f0_test is None else f0_test.shape,
            torch.finfo(ntk.dtype).eps,
        )

    def columns(self, outputs: Tensor) -> Tensor:
        """Training outputs or targets as (m, k)."""
        return outputs.reshape(self.f0.shape)

    def outputs(self, columns: Tensor) -> Tensor:
        """The inverse of `columns`, with any leading axes."""
        return columns.reshape(*columns.shape[:-2], *self.shape)

    def trajectory(self, train: Tensor, test: Tensor, scalar: bool) -> Trajectory:
        """Columns (t, m, k) and (t, q, k) as they were given; one time has no axis."""
        outputs = self.outputs(train)
        watched = None
        if self.test_shape is not None:
            watched = test.reshape(len(test), *self.test_shape)
        if not scalar:
            return Trajectory(outputs, watched)
        return Trajectory(outputs[0], None if watched is None else watched[0])


def kernel_matrix(who: str, ntk: Tensor) -> Float[Tensor, "m m"]:
    """A kernel on one set as a matrix in float64.

    Args:
        who: The function that was called, for the message.
        ntk: As the user gave it.

    Returns:
        Symmetric to the last bit. Whether it is positive is left to whoever decomposes
        it, see `check_positive`.

    Raises:
        ValueError: If it is not real, square, finite and symmetric up to round-off.
    """
    if not ntk.is_floating_point():
        raise ValueError(f"{who}: ntk is of {ntk.dtype}, expected real floating point.")
    matrix = as_matrix(finite(who, "ntk", ntk))
    if matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise ValueError(
            f"{who}: ntk has shape {tuple(ntk.shape)}; expected the kernel of at least "
            "one example with itself, (n, n, c, c), (n, n, c) or a square matrix."
        )
    gap, largest = (matrix - matrix.mT).abs().max(), matrix.abs().max()
    if gap > math.sqrt(torch.finfo(ntk.dtype).eps) * largest:
        raise ValueError(
            f"{who}: ntk is not symmetric, |Θ − Θᵀ| reaches {gap.item():.3g} and |Θ| "
            f"{largest.item():.3g}; expected the kernel of the training set with "
            "itself. The kernel between two sets is ntk_test."
        )
    return (matrix + matrix.mT) / 2


def refuse_negative(who: str, matrix: Float[Tensor, "m m"], eps: float) -> None:
    """`check_positive` at the price of a Cholesky factorization for most kernels."""
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    room = math.sqrt(eps) * matrix.abs().sum(1).max()  # at least √ε λ_max
    if torch.linalg.cholesky_ex(matrix + room * identity).info:
        values = torch.linalg.eigvalsh(matrix)
        check_positive(who, values[0], values[-1], eps)


def check_positive(who: str, smallest: Tensor, largest: Tensor, eps: float) -> None:
    """A ValueError if an eigenvalue is negative beyond round-off of the kernel."""
    if smallest < -math.sqrt(eps) * largest.clamp(min=0):
        raise ValueError(
            f"{who}: ntk has the eigenvalue {smallest.item():.3g} beside "
            f"{largest.item():.3g}; expected a kernel J Jᵀ, whose eigenvalues are ≥ 0."
        )


def moments(who: str, t: Times) -> tuple[Float[Tensor, " times"], bool]:
    """Times as a vector in float64, and whether there was only one, without an axis."""
    times = float64(t)
    if times.ndim > 1 or times.isnan().any() or (times < 0).any():
        raise ValueError(f"{who}: t={t!r}; expected one time or a list of times ≥ 0.")
    return times.reshape(-1), times.ndim == 0


def float64(numbers: float | Sequence[float] | Tensor) -> Tensor:
    """Numbers as a tensor; those of Python keep all their digits."""
    if isinstance(numbers, Tensor):
        return widened(numbers.detach())
    return torch.as_tensor(numbers, dtype=torch.float64)


def finite(who: str, argument: str, tensor: Tensor) -> Tensor:
    """The same numbers in float64; a ValueError if they are complex or not finite."""
    if tensor.is_complex():
        raise ValueError(f"{who}: {argument} is complex, expected real numbers.")
    wide = widened(tensor.detach())
    if not wide.isfinite().all():
        raise ValueError(
            f"{who}: {argument} has entries that are not finite, expected numbers."
        )
    return wide

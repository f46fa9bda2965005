"""The scalars of a kernel that is too large to form, from products with it.

Θ is multiplied with the same few vectors Z of random signs at every measurement:
E‖ΘZ‖² = s‖Θ‖² for s vectors, so that norms, distances and traces of kernels can be
estimated from their images ΘZ (Hutchinson 1990).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ntk_callbacks import metrics
from ntk_callbacks._types import Inputs
from ntk_callbacks.dynamics.stability import learning_rate_limit
from ntk_callbacks.engine.arguments import Request
from ntk_callbacks.engine.matrix_free import (
    Eigenpairs,
    random_signs,
    top_eigenpairs,
)
from ntk_callbacks.engine.products import TangentOperator
from ntk_callbacks.layout import widened

_PAIRS = 4  # largest eigenvalues that are reported
_VECTORS = (2, 16)  # fewest and most
_NUMBERS = 2**22  # of the images, which every checkpoint holds twice


@dataclass(frozen=True)
class KernelSketch:
    """A kernel by its images, and what it is compared with.

    Args:
        images: ΘₜZ, `(m, s)`.
        signs: Z, `(m, s)`.
        largest: The largest eigenvalues of Θₜ.
        reference: Θ₀Z.
        previous: ΘZ of the previous measurement; None at the first.
        steps: Updates since the previous measurement.
    """

    images: Tensor
    signs: Tensor
    largest: Eigenpairs
    reference: Tensor
    previous: Tensor | None
    steps: int

    @property
    def traces(self) -> Tensor:
        """zᵀΘz for each vector: estimates of the trace."""
        products = widened(self.images) * widened(self.signs)
        return products.sum(0)


def sketched(
    model: nn.Module, x: Inputs, request: Request
) -> tuple[Tensor, Tensor, Eigenpairs]:
    """Images of a few vectors of random signs, the same for all kernels of a size.

    Args:
        model: Left exactly as it was.
        x: The inputs.
        request: What is measured.

    Returns:
        ΘZ and Z, `(m, s)`, and the largest eigenvalues.
    """
    operator = TangentOperator(
        model,
        x,
        parameters=request.parameters,
        output_fn=request.output_fn,
        mode=request.mode,
        memory_budget=request.memory_budget,
    )
    m = operator.shape[0]
    fewest, most = _VECTORS
    count = min(most, max(fewest, _NUMBERS // m))
    signs = random_signs((m, count), torch.Generator().manual_seed(0))
    signs = signs.to(operator.device, operator.dtype)
    with operator:
        images = operator.ntk_vp(signs)
        largest = top_eigenpairs(operator, min(_PAIRS, m), tolerance=1e-3)
    return images, signs, largest


SketchMetric: TypeAlias = Callable[[KernelSketch], Tensor | float]


def _trace(sketch: KernelSketch) -> Tensor:
    return sketch.traces.mean()


def _trace_error(sketch: KernelSketch) -> Tensor:
    # 2 Σ_{i≠j} Θᵢⱼ²/s, with Σ Θᵢᵢ² as small as the trace allows. ‖Θ‖² comes from every
    # entry of the images; the spread of two traces is far too small half of the time.
    m, count = sketch.images.shape
    squares = _squares(sketch) - sketch.traces.mean().square() / m
    return squares.clamp(min=0).mul(2 / count).sqrt()


def _squares(sketch: KernelSketch) -> Tensor:
    """Estimate of ‖Θ‖²."""
    images = widened(sketch.images)
    return torch.sum(images * images) / images.shape[1]


def _eigenvalue_max(sketch: KernelSketch) -> Tensor:
    return sketch.largest.eigenvalues[0]


def _participation_ratio(sketch: KernelSketch) -> Tensor:
    return sketch.traces.mean().square().div(_squares(sketch))


def _relative_change(sketch: KernelSketch) -> Tensor:
    return metrics.relative_change(sketch.images, sketch.reference)


def _kernel_distance(sketch: KernelSketch) -> Tensor:
    return metrics.kernel_distance(sketch.images, sketch.reference)


def _kernel_velocity(sketch: KernelSketch) -> Tensor | float:
    if sketch.previous is None or sketch.steps == 0:
        return torch.nan
    return metrics.kernel_distance(sketch.images, sketch.previous) / sketch.steps


def _max_learning_rate(sketch: KernelSketch) -> Tensor:
    return learning_rate_limit(sketch.largest.eigenvalues[0])


SKETCH_METRICS: dict[str, SketchMetric] = {
    "trace": _trace,
    "trace_error": _trace_error,
    "eigenvalue_max": _eigenvalue_max,
    "participation_ratio": _participation_ratio,
    "relative_change": _relative_change,
    "kernel_distance": _kernel_distance,
    "kernel_velocity": _kernel_velocity,
    "max_learning_rate": _max_learning_rate,
}
"""Name -> scalar of a kernel that is not formed."""

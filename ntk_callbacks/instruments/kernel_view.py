"""The scalars of one kernel, beside the first kernel and the one before."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from ntk_callbacks import metrics
from ntk_callbacks._types import Kernel
from ntk_callbacks.dynamics.stability import learning_rate_limit
from ntk_callbacks.engine.spectral import kernel_eigenvalues
from ntk_callbacks.instruments.kernel_loss import LossTerms
from ntk_callbacks.instruments.kernel_modes import MODES, ResidualModes
from ntk_callbacks.instruments.kernel_source import KernelSource
from ntk_callbacks.instruments.kernel_stability import StabilityLimit
from ntk_callbacks.instruments.probe_loss import IGNORED
from ntk_callbacks.layout import as_matrix, widened


@dataclass(frozen=True)
class KernelView:
    """A kernel and what it is compared with; each property is computed once.

    Args:
        ntk: Θₜ as `empirical_ntk` returns it.
        reference: Θ₀.
        previous: Θ of the previous measurement; None at the first.
        steps: Updates since the previous measurement.
        targets: Targets of the probe, or None.
        parts: Θₜ by part, if it is split.
        reference_parts: Θ₀ by part, where a metric needs it.
        source: What was measured: the model, for what a kernel does not tell.
        modes: The residual in the top modes of the kernel before.
    """

    ntk: Kernel
    reference: Kernel
    previous: Kernel | None
    steps: int
    targets: Tensor | None
    parts: Mapping[str, Kernel] = field(default_factory=dict)
    reference_parts: Mapping[str, Kernel] = field(default_factory=dict)
    source: KernelSource | None = None
    modes: ResidualModes | None = None

    @cached_property
    def eigenvalues(self) -> Tensor:
        """Eigenvalues of the kernel matrix, the largest first, float64."""
        return kernel_eigenvalues(as_matrix(self.ntk))

    @cached_property
    def traced(self) -> Tensor:
        """Traced kernel (n, n), (1/c) Σₖ Θ[:, :, k, k]."""
        if self.ntk.ndim == 4:
            return torch.diagonal(self.ntk, dim1=2, dim2=3).mean(-1)
        return self.ntk.mean(-1) if self.ntk.ndim == 3 else self.ntk

    @property
    def classes(self) -> Tensor | None:
        """One class for each example, (n,), if the targets are classes."""
        targets = self.targets
        if (
            targets is None
            or targets.is_floating_point()
            or targets.numel() != len(targets)
            or not (targets != IGNORED).any()
        ):
            return None
        return targets.reshape(-1)

    @property
    def by_class(self) -> Tensor:
        """Traced kernel, its examples sorted by class where classes are known."""
        if self.classes is None:
            return self.traced
        order = self.classes.argsort(stable=True).to(self.traced.device)
        return self.traced[order][:, order]

    @cached_property
    def loss(self) -> LossTerms | None:
        """The loss at the outputs now; None unless all outputs are kept."""
        if self.source is None or self.ntk.ndim != 4:
            return None
        return self.source.loss.of(self.source.outputs(), self.targets)

    @cached_property
    def stability(self) -> StabilityLimit | None:
        """Where the optimizers become unstable, as far as that is known."""
        return None if self.source is None else self.source.stability()

    @cached_property
    def sharpness(self) -> Tensor | float | None:
        """λ_max of s Bᵀ J P⁻¹ Jᵀ B; None without a loss, NaN while P is not known."""
        if self.source is None or self.loss is None:
            return None
        edge, kernel = self.stability, self.ntk
        if edge is not None and not edge.seen:
            return torch.nan
        if edge is not None and edge.scaling is not None:
            kernel = self.source.kernel(scaling=edge.scaling)
        return self.loss.scale * kernel_eigenvalues(self.loss.weighted(kernel))[0]

    @cached_property
    def directions(self) -> Tensor:
        """Eigenvectors of the largest eigenvalues of Θₜ, (m, k), float64."""
        return _top_directions(self.ntk)

    @cached_property
    def reference_directions(self) -> Tensor:
        """Those of Θ₀."""
        return _top_directions(self.reference)


def _top_directions(kernel: Kernel) -> Tensor:
    matrix = as_matrix(kernel)
    return metrics.top_directions(matrix, min(MODES, len(matrix)))


Found: TypeAlias = Tensor | float | None
KernelMetric: TypeAlias = Callable[[KernelView], Found | Mapping[str, Found]]
"""A number, a matrix, or `{end of a tag: number}`; None where it has no meaning."""


def _trace(view: KernelView) -> Tensor:
    return widened(as_matrix(view.ntk).diagonal()).sum()


def _eigenvalue_max(view: KernelView) -> Tensor:
    return view.eigenvalues[0]


def _eigenvalue_min(view: KernelView) -> Tensor:
    return view.eigenvalues[-1]


def _condition_number(view: KernelView) -> Tensor:
    precision = torch.finfo(view.ntk.dtype).eps
    return metrics.condition_number(view.eigenvalues, tolerance=precision)


def _participation_ratio(view: KernelView) -> Tensor:
    return metrics.participation_ratio(view.eigenvalues)


def _entropy_rank(view: KernelView) -> Tensor:
    return metrics.entropy_rank(view.eigenvalues)


def _relative_change(view: KernelView) -> Tensor:
    return metrics.relative_change(view.ntk, view.reference)


def _kernel_distance(view: KernelView) -> Tensor:
    return metrics.kernel_distance(view.ntk, view.reference)


def _kernel_velocity(view: KernelView) -> Tensor | float:
    if view.previous is None or view.steps == 0:
        return torch.nan
    return metrics.kernel_distance(view.ntk, view.previous) / view.steps


def labeled(kernel: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """A kernel (n, n) and targets, without the examples that have no label, −100."""
    if targets.is_floating_point():
        return kernel, targets
    known = (targets.reshape(-1) != IGNORED).nonzero()[:, 0]
    index = known.to(kernel.device)
    return kernel[index][:, index], targets[known]


def _have_distances(targets: Tensor) -> bool:
    """Real targets, or one class for each example: not the tokens of a sequence."""
    return targets.is_floating_point() or targets.numel() == len(targets)


def _target_alignment(view: KernelView) -> Tensor | None:
    if view.targets is None or not _have_distances(view.targets):
        return None
    targets = view.targets.to(view.ntk.device)
    return metrics.target_alignment(*labeled(view.traced, targets))


def _off_diagonal_share(view: KernelView) -> Tensor | None:
    return metrics.off_diagonal_share(view.ntk) if view.ntk.ndim == 4 else None


def _max_learning_rate(view: KernelView) -> Tensor | None:
    if view.ntk.ndim != 4:  # λ_max of a traced kernel is smaller: no stability limit
        return None
    return learning_rate_limit(view.eigenvalues[0])


# Named functions, not lambdas: monitors are pickled to spawned processes.
METRICS: dict[str, KernelMetric] = {
    "trace": _trace,
    "eigenvalue_max": _eigenvalue_max,
    "eigenvalue_min": _eigenvalue_min,
    "condition_number": _condition_number,
    "participation_ratio": _participation_ratio,
    "entropy_rank": _entropy_rank,
    "relative_change": _relative_change,
    "kernel_distance": _kernel_distance,
    "kernel_velocity": _kernel_velocity,
    "target_alignment": _target_alignment,
    "off_diagonal_share": _off_diagonal_share,
    "max_learning_rate": _max_learning_rate,
}
"""Name -> scalar of a kernel; None where the quantity has no meaning."""

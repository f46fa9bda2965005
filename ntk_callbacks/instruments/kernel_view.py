"""The scalars of one kernel, beside the first kernel and the one before."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from ntk_callbacks import metrics
from ntk_callbacks._types import Kernel
from ntk_callbacks.dynamics.stability import learning_rate_limit
from ntk_callbacks.engine.spectral import kernel_eigenvalues
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
    """

    ntk: Kernel
    reference: Kernel
    previous: Kernel | None
    steps: int
    targets: Tensor | None

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
    def by_class(self) -> Tensor:
        """Traced kernel, its examples sorted by class where classes are known."""
        targets = self.targets
        if (
            targets is None
            or targets.is_floating_point()
            or targets.numel() != len(targets)
        ):
            return self.traced
        order = targets.reshape(-1).argsort(stable=True).to(self.traced.device)
        return self.traced[order][:, order]


KernelMetric: TypeAlias = Callable[[KernelView], Tensor | float | None]


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


def _have_distances(targets: Tensor) -> bool:
    """Real targets, or one class for each example: not the tokens of a sequence."""
    return targets.is_floating_point() or targets.numel() == len(targets)


def _target_alignment(view: KernelView) -> Tensor | None:
    if view.targets is None or not _have_distances(view.targets):
        return None
    return metrics.target_alignment(view.traced, view.targets.to(view.ntk.device))


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


def chosen_metrics(
    wanted: Sequence[str] | Mapping[str, KernelMetric] | None,
) -> dict[str, KernelMetric]:
    """The metrics that a user asks for.

    Args:
        wanted: None for all, names of some, or a mapping of the user's own.

    Returns:
        Name -> function.

    Raises:
        ValueError: If a name is unknown.
    """
    if wanted is None:
        return METRICS
    if isinstance(wanted, Mapping):
        return dict(wanted)
    unknown = [name for name in wanted if name not in METRICS]
    if unknown:
        raise ValueError(
            f"NTKMonitor: unknown metrics {unknown}; expected some of "
            f"{', '.join(METRICS)}, or a mapping name -> function of a KernelView."
        )
    return {name: METRICS[name] for name in wanted}

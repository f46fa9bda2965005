"""What a kernel tells on demand: finer, or dearer, than what is always drawn."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ntk_callbacks import metrics
from ntk_callbacks._types import Kernel
from ntk_callbacks.errors import MemoryBudgetError, UnsupportedModelError
from ntk_callbacks.functional import select_parameters
from ntk_callbacks.instruments.instrument import tag_name
from ntk_callbacks.instruments.kernel_descent import (
    Descent,
    descent_of,
    momentum_buffers,
)
from ntk_callbacks.instruments.kernel_loss import LossTerms
from ntk_callbacks.instruments.kernel_modes import ResidualModes
from ntk_callbacks.instruments.kernel_source import KernelSource
from ntk_callbacks.instruments.kernel_stability import trains_just
from ntk_callbacks.instruments.kernel_view import (
    METRICS,
    Found,
    KernelMetric,
    KernelView,
    labeled,
)
from ntk_callbacks.layout import as_matrix, widened


def _scale_change(view: KernelView) -> Tensor:
    return metrics.scale_change(view.ntk, view.reference)


def _shape_change(view: KernelView) -> Tensor:
    return metrics.shape_change(view.ntk, view.reference)


def _drift_noise_floor(view: KernelView) -> Tensor | float:
    """½ |d₁ − d₂| with d the relative change on the even and on the odd examples."""
    # Its root mean square is the standard error of d on the whole probe: the variance
    # is twice as large on each half, and four times for their difference.
    if len(view.ntk) < 2:
        return torch.nan
    first, second = (
        metrics.relative_change(
            view.ntk[start::2, start::2], view.reference[start::2, start::2]
        )
        for start in (0, 1)
    )
    return (first - second).abs() / 2


def _subspace_angle(view: KernelView) -> Tensor | float:
    if torch.equal(view.directions, view.reference_directions):
        return 0.0  # the start itself: no round-off that spans decades of a plot
    angles = metrics.principal_angles(view.directions, view.reference_directions)
    return angles[-1]


def _subspace_overlap(view: KernelView) -> Tensor:
    return metrics.subspace_overlap(view.directions, view.reference_directions)


def _class_ratio(view: KernelView) -> Tensor | None:
    if view.classes is None:
        return None
    return metrics.within_between_ratio(*labeled(view.traced, view.classes))


def _class_blocks(view: KernelView) -> Tensor | None:
    if view.classes is None:
        return None
    return metrics.class_blocks(*labeled(view.traced, view.classes))


def _batchnorm_gap(view: KernelView) -> Tensor | float | None:
    """‖Θ_train − Θ_eval‖/‖Θ_eval‖ of pseudo-NTKs, both of the weights now."""
    # Through batch statistics each row of J takes a backward pass of the whole batch,
    # and the sum of the outputs has c times fewer rows.
    source = view.source
    if source is None or not source.has_batch_statistics():
        return None
    training = source.request.mode == "train"
    here = _pseudo(view)
    try:
        if here is None:
            here = source.kernel(outputs="pseudo")
        other = source.kernel(outputs="pseudo", mode="eval" if training else "train")
    except UnsupportedModelError:  # batch statistics of all processes
        return torch.nan
    train, evaluated = (here, other) if training else (other, here)
    return metrics.relative_change(train, evaluated)


def _pseudo(view: KernelView) -> Tensor | None:
    """The kernel of Σₖ fₖ/√c, (1/c) Σₖₗ Θ[:, :, k, l]; None if Θ does not tell."""
    if view.ntk.ndim == 4:
        return widened(view.ntk).sum((2, 3)) / view.ntk.shape[-1]
    known = view.source is not None and view.source.request.outputs == "pseudo"
    return view.ntk if known else None


def _sharpness(view: KernelView) -> Tensor | float | None:
    return view.sharpness


def _sharpness_limit(view: KernelView) -> float | None:
    if view.loss is None or view.stability is None:
        return None
    return view.stability.limit


def _sharpness_ratio(view: KernelView) -> Tensor | float | None:
    if view.sharpness is None or view.stability is None:
        return None
    return view.sharpness / view.stability.limit


def _traces(parts: Mapping[str, Kernel]) -> dict[str, Tensor]:
    return {
        part: widened(as_matrix(kernel).diagonal()).sum()
        for part, kernel in parts.items()
    }


def part_traces(view: KernelView) -> dict[str, Found]:
    """Trace of each part of a kernel that is split, `modules/trace/<part>`."""
    traces = _traces(view.parts)
    return {f"modules/trace/{tag_name(part)}": t for part, t in traces.items()}


def _trace_share(view: KernelView) -> dict[str, Found]:
    traces = _traces(view.parts)
    if not traces:
        return {}
    whole = torch.stack([*traces.values()]).sum()
    return {
        f"modules/trace_share/{tag_name(part)}": trace / whole
        for part, trace in traces.items()
    }


def _drift_share(view: KernelView) -> dict[str, Found]:
    """⟨ΔΘₘ, ΔΘ⟩/‖ΔΘ‖², which adds up to 1 over the parts; NaN before anything moved."""
    if not view.reference_parts:
        return {}
    names = {**view.parts, **view.reference_parts}
    whole = sum((_change(view, part) for part in names), torch.zeros(()))
    square = whole.square().sum()
    return {
        f"modules/drift_share/{tag_name(part)}": (
            (_change(view, part) * whole).sum() / square
        )
        for part in names
    }


def _change(view: KernelView, part: str) -> Tensor:
    """ΔΘₘ in float64; a part that is new, or no longer trained, comes from or to 0."""
    absent = view.ntk.new_zeros(())
    now, then = view.parts.get(part, absent), view.reference_parts.get(part, absent)
    return widened(now) - widened(then)


def _residual_modes(view: KernelView) -> dict[str, Found]:
    if view.source is None or view.loss is None or view.modes is None:
        return {}
    source, rule = view.source, descent_of(view.source.optimizers)
    given = source.model, source.request.parameters
    # Θ must be the kernel of what moves: not of a part of it, nor of more.
    of = (
        [*select_parameters(*given)] if trains_just(source.optimizers, *given) else None
    )
    if rule is None or of is None:
        moving: Tensor | None = torch.full_like(view.loss.residual, torch.nan).ravel()
    else:
        moving = _moving(source, view.loss, view.modes, of, rule)
    found = view.modes.measured(view.loss, view.ntk, view.steps, rule, of, moving)
    return {f"modes/{end}": value for end, value in found.items()}


def _moving(
    source: KernelSource,
    terms: LossTerms,
    modes: ResidualModes,
    names: list[str],
    rule: Descent,
) -> Tensor | None:
    """HJv of the momentum v of the optimizer, NaN if unknown; None if there is none."""
    v = momentum_buffers(source.optimizers[0], source.model, names, rule)
    if v is None:
        return None
    try:
        return terms.curved(source.push(v))
    except (UnsupportedModelError, MemoryBudgetError) as error:
        modes.tell_unknown(error)
        return torch.full_like(terms.residual, torch.nan).ravel()


DETAILS: dict[str, KernelMetric] = {
    "scale_change": _scale_change,
    "shape_change": _shape_change,
    "drift_noise_floor": _drift_noise_floor,
    "subspace_angle": _subspace_angle,
    "subspace_overlap": _subspace_overlap,
    "class_ratio": _class_ratio,
    "class_blocks": _class_blocks,
    "batchnorm_gap": _batchnorm_gap,
    "sharpness": _sharpness,
    "sharpness_limit": _sharpness_limit,
    "sharpness_ratio": _sharpness_ratio,
    "residual_modes": _residual_modes,
    "trace_share": _trace_share,
    "drift_share": _drift_share,
}
"""Name -> what is measured only where it is asked for."""

OF_PARTS = ("trace_share", "drift_share")
"""Those that need a kernel split by module, parameter or pattern."""


def chosen_metrics(
    wanted: Literal["all"] | Sequence[str] | Mapping[str, KernelMetric] | None,
    *,
    split: bool,
) -> dict[str, KernelMetric]:
    """The metrics that a user asks for.

    Args:
        wanted: None for `METRICS`; `"all"` for these and `DETAILS`; names of some; or a
            mapping of the user's own.
        split: Whether the kernel is split into parts.

    Returns:
        Name -> function.

    Raises:
        ValueError: If a name is unknown, or needs parts and there are none.
    """
    if wanted is None:
        return METRICS
    known = {**METRICS, **DETAILS}
    if isinstance(wanted, Mapping):
        return dict(wanted)
    if wanted == "all":
        return {n: f for n, f in known.items() if split or n not in OF_PARTS}
    names = [wanted] if isinstance(wanted, str) else [*wanted]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"NTKMonitor: unknown metrics {unknown}; expected some of "
            f"{', '.join(METRICS)}, on demand {', '.join(DETAILS)}, or 'all', or a "
            "mapping name -> function of a KernelView."
        )
    unsplit = [name for name in names if name in OF_PARTS and not split]
    if unsplit:
        raise ValueError(
            f"NTKMonitor: {', '.join(unsplit)} are shares of parts of the kernel, and "
            'by=None splits it into none. Pass by="module".'
        )
    return {name: known[name] for name in names}

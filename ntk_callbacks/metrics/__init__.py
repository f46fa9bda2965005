"""Scalars from kernels, spectra and weights: pure functions of tensors."""

from ntk_callbacks.metrics.alignment import (
    cka,
    class_blocks,
    off_diagonal_share,
    target_alignment,
    within_between_ratio,
)
from ntk_callbacks.metrics.drift import (
    cosine_similarity,
    displacement,
    kernel_distance,
    relative_change,
    scale_change,
    shape_change,
)
from ntk_callbacks.metrics.spectrum import (
    condition_number,
    entropy_rank,
    isometry_gap,
    log_std,
    mean_square,
    participation_ratio,
)
from ntk_callbacks.metrics.subspaces import (
    principal_angles,
    subspace_overlap,
    top_directions,
)

__all__ = [
    "cka",
    "class_blocks",
    "condition_number",
    "cosine_similarity",
    "displacement",
    "entropy_rank",
    "isometry_gap",
    "kernel_distance",
    "log_std",
    "mean_square",
    "off_diagonal_share",
    "participation_ratio",
    "principal_angles",
    "relative_change",
    "scale_change",
    "shape_change",
    "subspace_overlap",
    "target_alignment",
    "top_directions",
    "within_between_ratio",
]

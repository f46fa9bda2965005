"""Scalars from kernels, spectra and weights: pure functions of tensors."""

from ntk_callbacks.metrics.alignment import cka, off_diagonal_share, target_alignment
from ntk_callbacks.metrics.drift import (
    cosine_similarity,
    displacement,
    kernel_distance,
    relative_change,
)
from ntk_callbacks.metrics.spectrum import (
    condition_number,
    entropy_rank,
    log_std,
    mean_square,
    participation_ratio,
)

__all__ = [
    "cka",
    "condition_number",
    "cosine_similarity",
    "displacement",
    "entropy_rank",
    "kernel_distance",
    "log_std",
    "mean_square",
    "off_diagonal_share",
    "participation_ratio",
    "relative_change",
    "target_alignment",
]

"""Closed-form answers beside the measured ones: what infinite width says.

Pure functions of numbers and kernels in float64. σ_w and σ_b are standard deviations:
h = (σ_w/√fan_in) W a + σ_b b with W and b standard normal (`parametrization="ntk"`),
the same random function as W ~ N(0, σ_w²/fan_in) and b ~ N(0, σ_b²) (`"standard"`).
"""

from ntk_callbacks.theory.closed_forms import PiecewiseLinear
from ntk_callbacks.theory.conventions import (
    from_neural_tangents,
    from_torch_func,
    to_neural_tangents,
    to_torch_func,
)
from ntk_callbacks.theory.convolutional import (
    convolution,
    convolutional,
    flatten,
    global_average_pool,
)
from ntk_callbacks.theory.expectations import curvature_moment, moment, pair_moment
from ntk_callbacks.theory.finite_width import (
    SeedStatistics,
    activation_relative_variance,
    ntk_mean,
    ntk_relative_variance,
    ntk_relative_variance_at_large_width,
    seed_statistics,
)
from ntk_callbacks.theory.fully_connected import (
    fully_connected,
    fully_connected_residual,
)
from ntk_callbacks.theory.kernels import Covariances, Kernels, infinite_width_kernels
from ntk_callbacks.theory.layers import activate, dense, residual, sequential
from ntk_callbacks.theory.learning import Learning
from ntk_callbacks.theory.scales import loss_scale, ntk_parametrization_scaling

__all__ = [
    "Covariances",
    "Kernels",
    "Learning",
    "PiecewiseLinear",
    "SeedStatistics",
    "activate",
    "activation_relative_variance",
    "convolution",
    "convolutional",
    "curvature_moment",
    "dense",
    "flatten",
    "from_neural_tangents",
    "from_torch_func",
    "fully_connected",
    "fully_connected_residual",
    "global_average_pool",
    "infinite_width_kernels",
    "loss_scale",
    "moment",
    "ntk_mean",
    "ntk_parametrization_scaling",
    "ntk_relative_variance",
    "ntk_relative_variance_at_large_width",
    "pair_moment",
    "residual",
    "seed_statistics",
    "sequential",
    "to_neural_tangents",
    "to_torch_func",
]

"""Closed-form answers beside the measured ones: what infinite width says.

Pure functions of numbers and kernels in float64. σ_w and σ_b are standard deviations:
h = (σ_w/√fan_in) W a + σ_b b with W and b standard normal (`parametrization="ntk"`),
the same random function as W ~ N(0, σ_w²/fan_in) and b ~ N(0, σ_b²) (`"standard"`).
"""

from ntk_callbacks.theory.closed_forms import PiecewiseLinear
from ntk_callbacks.theory.convolutional import (
    convolution,
    convolutional,
    flatten,
    global_average_pool,
)
from ntk_callbacks.theory.expectations import curvature_moment, moment, pair_moment
from ntk_callbacks.theory.fully_connected import (
    fully_connected,
    fully_connected_residual,
)
from ntk_callbacks.theory.kernels import Covariances, Kernels, infinite_width_kernels
from ntk_callbacks.theory.layers import activate, dense, residual, sequential
from ntk_callbacks.theory.learning import Learning

__all__ = [
    "Covariances",
    "Kernels",
    "Learning",
    "PiecewiseLinear",
    "activate",
    "convolution",
    "convolutional",
    "curvature_moment",
    "dense",
    "flatten",
    "fully_connected",
    "fully_connected_residual",
    "global_average_pool",
    "infinite_width_kernels",
    "moment",
    "pair_moment",
    "residual",
    "sequential",
]

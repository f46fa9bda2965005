"""Closed-form answers beside the measured ones: what infinite width says.

Pure functions of numbers and kernels in float64. σ_w and σ_b are standard deviations:
h = (σ_w/√fan_in) W a + σ_b b with W and b standard normal (`parametrization="ntk"`),
the same random function as W ~ N(0, σ_w²/fan_in) and b ~ N(0, σ_b²) (`"standard"`).
"""

from ntk_callbacks.theory.activations import ACTIVATIONS, Activation
from ntk_callbacks.theory.closed_forms import PiecewiseLinear
from ntk_callbacks.theory.expectations import curvature_moment, moment, pair_moment

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "PiecewiseLinear",
    "curvature_moment",
    "moment",
    "pair_moment",
]

"""Closed-form answers beside the measured ones: what infinite width says.

Pure functions of numbers and kernels in float64. σ_w and σ_b are standard deviations:
h = (σ_w/√fan_in) W a + σ_b b with W and b standard normal (`parametrization="ntk"`),
the same random function as W ~ N(0, σ_w²/fan_in) and b ~ N(0, σ_b²) (`"standard"`).
"""

from ntk_callbacks.theory.batch_norm import BatchNormField, batch_norm_mean_field
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
from ntk_callbacks.theory.criticality import (
    CriticalPoint,
    critical_line,
    critical_point,
    critical_sigma_w,
    phase_diagram,
)
from ntk_callbacks.theory.densities import (
    JacobianDensity,
    fuss_catalan_density,
    jacobian_density,
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
from ntk_callbacks.theory.jacobian_spectra import (
    JacobianMoments,
    fuss_catalan_moments,
    gaussian_second_moment,
    gaussian_squared_mean,
    jacobian_moments,
)
from ntk_callbacks.theory.kernels import Covariances, Kernels, infinite_width_kernels
from ntk_callbacks.theory.layers import activate, dense, residual, sequential
from ntk_callbacks.theory.learning import Learning
from ntk_callbacks.theory.lstm import LSTMField, lstm
from ntk_callbacks.theory.mean_field import MeanField, mean_field
from ntk_callbacks.theory.recurrent import (
    Gate,
    RecurrentField,
    gru,
    minimal_rnn,
    vanilla_rnn,
)
from ntk_callbacks.theory.residual_mean_field import (
    ResidualTrajectory,
    residual_trajectory,
)
from ntk_callbacks.theory.scales import loss_scale, ntk_parametrization_scaling
from ntk_callbacks.theory.signal_maps import (
    SignalTrajectory,
    c_map,
    q_map,
    signal_trajectory,
)

__all__ = [
    "BatchNormField",
    "Covariances",
    "CriticalPoint",
    "Gate",
    "JacobianDensity",
    "JacobianMoments",
    "Kernels",
    "LSTMField",
    "Learning",
    "MeanField",
    "PiecewiseLinear",
    "RecurrentField",
    "ResidualTrajectory",
    "SeedStatistics",
    "SignalTrajectory",
    "activate",
    "activation_relative_variance",
    "batch_norm_mean_field",
    "c_map",
    "convolution",
    "convolutional",
    "critical_line",
    "critical_point",
    "critical_sigma_w",
    "curvature_moment",
    "dense",
    "flatten",
    "from_neural_tangents",
    "from_torch_func",
    "fully_connected",
    "fully_connected_residual",
    "fuss_catalan_density",
    "fuss_catalan_moments",
    "gaussian_second_moment",
    "gaussian_squared_mean",
    "global_average_pool",
    "gru",
    "infinite_width_kernels",
    "jacobian_density",
    "jacobian_moments",
    "loss_scale",
    "lstm",
    "mean_field",
    "minimal_rnn",
    "moment",
    "ntk_mean",
    "ntk_parametrization_scaling",
    "ntk_relative_variance",
    "ntk_relative_variance_at_large_width",
    "pair_moment",
    "phase_diagram",
    "q_map",
    "residual",
    "residual_trajectory",
    "seed_statistics",
    "sequential",
    "signal_trajectory",
    "to_neural_tangents",
    "to_torch_func",
    "vanilla_rnn",
]

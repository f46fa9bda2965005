"""What a kernel predicts of training.

Pure functions of kernels, in float64. Losses are sums over the examples, ½ Σ (f − y)²
or −Σ log softmax(f)[y]; for s times such a sum multiply learning rates and times by s.
"""

from ntk_callbacks.dynamics.early_stopping import early_stopping_time
from ntk_callbacks.dynamics.ensemble import Gaussian, ensemble, nngp_posterior
from ntk_callbacks.dynamics.function_space import Trajectory
from ntk_callbacks.dynamics.gradient_descent import gradient_descent
from ntk_callbacks.dynamics.gradient_flow import gradient_flow
from ntk_callbacks.dynamics.kernel_change import kernel_change
from ntk_callbacks.dynamics.linearize import LinearizedModel, linearize
from ntk_callbacks.dynamics.losses import loss_gradient
from ntk_callbacks.dynamics.modes import Eigenmodes, eigenmodes, learning_times
from ntk_callbacks.dynamics.one_step import LossChange, loss_change, output_change
from ntk_callbacks.dynamics.optimizer_scaling import optimizer_scaling
from ntk_callbacks.dynamics.optimizer_step import clipped_gradients, predicted_step
from ntk_callbacks.dynamics.parameter_distance import parameter_distance
from ntk_callbacks.dynamics.regression import kernel_regression
from ntk_callbacks.dynamics.scale_output import ScaledModel, scale_output
from ntk_callbacks.dynamics.stability import (
    contraction_factors,
    learning_steps,
    max_learning_rate,
)

__all__ = [
    "Eigenmodes",
    "Gaussian",
    "LinearizedModel",
    "LossChange",
    "ScaledModel",
    "Trajectory",
    "clipped_gradients",
    "contraction_factors",
    "early_stopping_time",
    "eigenmodes",
    "ensemble",
    "gradient_descent",
    "gradient_flow",
    "kernel_change",
    "kernel_regression",
    "learning_steps",
    "learning_times",
    "linearize",
    "loss_change",
    "loss_gradient",
    "max_learning_rate",
    "nngp_posterior",
    "optimizer_scaling",
    "output_change",
    "parameter_distance",
    "predicted_step",
    "scale_output",
]

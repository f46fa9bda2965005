"""See what a network's tangent kernel does while it trains."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ntk_callbacks import dynamics, metrics, theory
from ntk_callbacks.callbacks.as_schedule import capped, either
from ntk_callbacks.callbacks.events import learning_rate_change, loss_spike
from ntk_callbacks.callbacks.schedule import at, every, log_spaced
from ntk_callbacks.dynamics import optimizer_scaling
from ntk_callbacks.engine.density import spectral_density
from ntk_callbacks.engine.features import conjugate_kernel, layer_features
from ntk_callbacks.engine.input_jacobian import input_jacobian, input_singular_values
from ntk_callbacks.engine.kernel import empirical_ntk, plan_ntk
from ntk_callbacks.engine.layer_jacobians import jacobian_by_depth, layer_jacobian
from ntk_callbacks.engine.matrix_free import top_eigenpairs, trace_estimate
from ntk_callbacks.engine.plan import Plan
from ntk_callbacks.engine.products import TangentOperator
from ntk_callbacks.engine.signals import signal_statistics
from ntk_callbacks.engine.state_jacobians import jacobian_by_time
from ntk_callbacks.guard import quietly
from ntk_callbacks.instruments.kernel import NTKOptions
from ntk_callbacks.instruments.linearization_options import LinearizationOptions
from ntk_callbacks.layout import as_matrix
from ntk_callbacks.probe import Probe
from ntk_callbacks.reporting.history import load_history

if TYPE_CHECKING:
    from ntk_callbacks.callbacks.features import FeatureMonitor
    from ntk_callbacks.callbacks.hugging_face import NTKTrainerCallback
    from ntk_callbacks.callbacks.jacobian import JacobianMonitor
    from ntk_callbacks.callbacks.kernel import NTKMonitor
    from ntk_callbacks.callbacks.linearization import LinearizationMonitor
    from ntk_callbacks.callbacks.parameters import ParameterDriftMonitor
    from ntk_callbacks.callbacks.passive import assert_passive
    from ntk_callbacks.callbacks.prediction import PredictionMonitor
    from ntk_callbacks.callbacks.signal import SignalMonitor

__version__ = "0.1.0"

__all__ = [
    "FeatureMonitor",
    "JacobianMonitor",
    "LinearizationMonitor",
    "LinearizationOptions",
    "NTKMonitor",
    "NTKOptions",
    "NTKTrainerCallback",
    "ParameterDriftMonitor",
    "Plan",
    "PredictionMonitor",
    "Probe",
    "SignalMonitor",
    "TangentOperator",
    "as_matrix",
    "assert_passive",
    "at",
    "capped",
    "conjugate_kernel",
    "dynamics",
    "either",
    "empirical_ntk",
    "every",
    "input_jacobian",
    "input_singular_values",
    "jacobian_by_depth",
    "jacobian_by_time",
    "layer_features",
    "layer_jacobian",
    "learning_rate_change",
    "load_history",
    "log_spaced",
    "loss_spike",
    "metrics",
    "optimizer_scaling",
    "plan_ntk",
    "quietly",
    "signal_statistics",
    "spectral_density",
    "theory",
    "top_eigenpairs",
    "trace_estimate",
]

# Imported when first asked for: Lightning takes seconds, and notebooks may not need it.
_LAZY = {
    "FeatureMonitor": "ntk_callbacks.callbacks.features",
    "JacobianMonitor": "ntk_callbacks.callbacks.jacobian",
    "LinearizationMonitor": "ntk_callbacks.callbacks.linearization",
    "NTKMonitor": "ntk_callbacks.callbacks.kernel",
    "NTKTrainerCallback": "ntk_callbacks.callbacks.hugging_face",
    "ParameterDriftMonitor": "ntk_callbacks.callbacks.parameters",
    "PredictionMonitor": "ntk_callbacks.callbacks.prediction",
    "SignalMonitor": "ntk_callbacks.callbacks.signal",
    "assert_passive": "ntk_callbacks.callbacks.passive",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)

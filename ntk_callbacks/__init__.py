"""See what a network's tangent kernel does while it trains."""

from ntk_callbacks.engine.input_jacobian import input_jacobian, input_singular_values
from ntk_callbacks.engine.kernel import as_matrix, empirical_ntk
from ntk_callbacks.guard import quietly
from ntk_callbacks.probe import Probe

__version__ = "0.1.0"

__all__ = [
    "Probe",
    "as_matrix",
    "empirical_ntk",
    "input_jacobian",
    "input_singular_values",
    "quietly",
]

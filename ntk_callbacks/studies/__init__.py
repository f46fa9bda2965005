"""Reference experiments that reproduce known results, each held to a number."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ntk_callbacks.studies.batchnorm_explosion import BatchNormExplosion
    from ntk_callbacks.studies.continual import Continual
    from ntk_callbacks.studies.deep_cnn import DeepCNN
    from ntk_callbacks.studies.double_descent import DoubleDescent
    from ntk_callbacks.studies.edge_of_chaos import EdgeOfChaos
    from ntk_callbacks.studies.edge_of_stability import EdgeOfStability
    from ntk_callbacks.studies.elbows import Elbows
    from ntk_callbacks.studies.finite_width import FiniteWidth
    from ntk_callbacks.studies.gating import Gating
    from ntk_callbacks.studies.isometry import Isometry
    from ntk_callbacks.studies.kernel_evolution import KernelEvolution
    from ntk_callbacks.studies.kernel_regression import KernelRegression
    from ntk_callbacks.studies.lazy_scale import LazyScale
    from ntk_callbacks.studies.lazy_width import LazyWidth
    from ntk_callbacks.studies.learning_modes import LearningModes
    from ntk_callbacks.studies.linearized import Linearized
    from ntk_callbacks.studies.loss_prediction import LossPrediction
    from ntk_callbacks.studies.resnet_init import ResNetInit
    from ntk_callbacks.studies.signal_propagation import SignalPropagation

__all__ = [
    "BatchNormExplosion",
    "Continual",
    "DeepCNN",
    "DoubleDescent",
    "EdgeOfChaos",
    "EdgeOfStability",
    "Elbows",
    "FiniteWidth",
    "Gating",
    "Isometry",
    "KernelEvolution",
    "KernelRegression",
    "LazyScale",
    "LazyWidth",
    "LearningModes",
    "Linearized",
    "LossPrediction",
    "ResNetInit",
    "SignalPropagation",
]

# Imported when first asked for: one study needs not wait for the others.
_LAZY = {
    "BatchNormExplosion": "batchnorm_explosion",
    "Continual": "continual",
    "DeepCNN": "deep_cnn",
    "DoubleDescent": "double_descent",
    "EdgeOfChaos": "edge_of_chaos",
    "EdgeOfStability": "edge_of_stability",
    "Elbows": "elbows",
    "FiniteWidth": "finite_width",
    "Gating": "gating",
    "Isometry": "isometry",
    "KernelEvolution": "kernel_evolution",
    "KernelRegression": "kernel_regression",
    "LazyScale": "lazy_scale",
    "LazyWidth": "lazy_width",
    "LearningModes": "learning_modes",
    "Linearized": "linearized",
    "LossPrediction": "loss_prediction",
    "ResNetInit": "resnet_init",
    "SignalPropagation": "signal_propagation",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)

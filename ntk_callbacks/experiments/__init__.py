"""Reference experiments: models, data and the LightningModule that trains them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ntk_callbacks.experiments.data import Digits, TorchvisionImages
    from ntk_callbacks.experiments.initializations import (
        critical_,
        delta_orthogonal_,
        scaled_orthogonal_,
    )
    from ntk_callbacks.experiments.layers import Conv2d, Linear
    from ntk_callbacks.experiments.models import ACTIVATIONS, CNN, MLP, ResNet
    from ntk_callbacks.experiments.module import Classifier

__all__ = [
    "ACTIVATIONS",
    "CNN",
    "MLP",
    "Classifier",
    "Conv2d",
    "Digits",
    "Linear",
    "ResNet",
    "TorchvisionImages",
    "critical_",
    "delta_orthogonal_",
    "scaled_orthogonal_",
]

# Imported when first asked for: `ntk-train --help` need not wait for Lightning.
_LAZY = {
    "ACTIVATIONS": "models",
    "CNN": "models",
    "Classifier": "module",
    "Conv2d": "layers",
    "Digits": "data",
    "Linear": "layers",
    "MLP": "models",
    "ResNet": "models",
    "TorchvisionImages": "data",
    "critical_": "initializations",
    "delta_orthogonal_": "initializations",
    "scaled_orthogonal_": "initializations",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)

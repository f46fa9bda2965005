"""What it takes to measure a metric of a kernel, told where it is not there."""

import warnings
from collections.abc import Mapping
from typing import Any

_LOSS = "a kernel with all outputs, and targets in the probe whose loss is known"
_EDGE = f"{_LOSS}; an optimizer whose edge of stability is known"
NEEDS = {
    "target_alignment": "targets in the probe, numbers or one class for each example",
    "off_diagonal_share": "a kernel with all outputs",
    "max_learning_rate": "a kernel with all outputs",
    "class_ratio": "one class for each example as targets in the probe",
    "class_blocks": "one class for each example as targets in the probe",
    "batchnorm_gap": "BatchNorm layers with running statistics",
    "sharpness": _LOSS,
    "sharpness_limit": _EDGE,
    "sharpness_ratio": _EDGE,
    "residual_modes": _LOSS,
}
"""Name -> what it takes to measure it, where that is not always there."""


def tell_missing(wanted: Any, found: Mapping[str, object]) -> None:
    """Warn of metrics that a user named and that have no value here.

    Args:
        wanted: The user's choice; nothing is told unless it is a list of names, or one.
        found: What was measured, by name; None or nothing where there is no value.
    """
    if wanted is None or wanted == "all" or isinstance(wanted, Mapping):
        return
    missing = [
        f"{name} ({NEEDS[name]})"
        for name, value in found.items()
        if name in NEEDS and _is_nothing(value)
    ]
    if missing:
        warnings.warn(
            "NTKMonitor: not measured, for want of what they need: "
            f"{'; '.join(missing)}.",
            stacklevel=2,
        )


def _is_nothing(value: object) -> bool:
    return value is None or (isinstance(value, Mapping) and not value)

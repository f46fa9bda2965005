"""Which plot belongs under which heading of a report, and in which order."""

from collections.abc import Iterable

_DRIFT = ("relative_change", "kernel_distance", "kernel_velocity", "target_alignment")

HEADINGS = {
    "spectrum": "Spectrum of the kernel",
    "drift": "Drift of the kernel",
    "isometry": "Isometry: the input-output Jacobian",
    "parameters": "Parameters",
    "signal": "Signals by depth",
    "prediction": "Predicted and actual change",
    "linear": "The linearized network",
    "features": "Features",
    "other": "Further quantities",
    "cost": "Cost and accuracy of the measurements",
}
"""Key -> heading, in the order of the page."""

_PREFIXES = {
    "ntk": "spectrum",
    "jacobian": "isometry",
    "params": "parameters",
    "signal": "signal",
    "prediction": "prediction",
    "linear": "linear",
    "features": "features",
    "monitor": "cost",
}

_PARTS = ("modules", "tensors", "classes", "layers", "modes", "time")


def grouped(tags: Iterable[str]) -> dict[str, list[str]]:
    """Tags by heading; those of parts (modules, tensors) are left in their order.

    Args:
        tags: In the order of measurement.

    Returns:
        Key of `HEADINGS` -> its tags; empty headings are left out.

    Example:
        >>> grouped(["params/displacement", "ntk/kernel_distance", "ntk/trace"])
        {'spectrum': ['ntk/trace'], 'drift': ['ntk/kernel_distance'], \
'parameters': ['params/displacement']}
    """
    found: dict[str, list[str]] = {key: [] for key in HEADINGS}
    for tag in tags:
        found[_heading(tag)].append(tag)
    return {key: tags for key, tags in found.items() if tags}


def of_a_part(tag: str) -> bool:
    """Whether a quantity is that of one of many: a module, a layer, a class, a mode."""
    return any(f"_{parts}/" in tag for parts in _PARTS)


def _heading(tag: str) -> str:
    if tag.startswith("ntk") and tag.rpartition("/")[2] in _DRIFT:
        return "drift"
    return next((key for p, key in _PREFIXES.items() if tag.startswith(p)), "other")

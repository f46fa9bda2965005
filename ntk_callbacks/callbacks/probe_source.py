"""What a monitor measures on: a probe, or where to get one."""

from os import PathLike, fspath
from typing import Any, TypeAlias

from torch import Tensor

from ntk_callbacks.probe import Probe

ProbeSource: TypeAlias = int | str | PathLike[str] | Probe | Tensor


def checked_probe(probe: ProbeSource) -> int | Probe:
    """What a monitor measures on, checked as far as it can be before the training.

    Args:
        probe: A `Probe`; a tensor of inputs; the path of a saved probe; or a number of
            examples to draw from the training data.

    Returns:
        The probe, or the number of examples.

    Raises:
        ValueError: If it is none of these, holds no example, or the file is no probe.
    """
    if isinstance(probe, Probe):
        return probe
    if isinstance(probe, Tensor):
        return Probe(probe)
    if isinstance(probe, str | PathLike):
        return Probe.load(fspath(probe))
    if isinstance(probe, bool) or not hasattr(probe, "__index__"):
        raise ValueError(
            f"probe is a {type(probe).__name__}; expected a number of examples, a "
            "Probe, a tensor of inputs, or the path of a saved probe."
        )
    if int(probe) < 1:
        raise ValueError(f"probe must hold at least 1 example, got {probe}.")
    return int(probe)


def probe_of(trainer: Any, source: int | Probe) -> Probe:
    """The probe itself, drawn from the training data if it is a number."""
    if isinstance(source, Probe):
        return source
    return Probe.from_loader(trainer.train_dataloader, source)

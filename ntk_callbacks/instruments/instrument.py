"""What every instrument offers, and the names its numbers are reported under."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from torch import Tensor, nn

from ntk_callbacks.probe import Probe
from ntk_callbacks.record import Measurement

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Options = TypeVar("_Options", bound="DataclassInstance")

_WRAPPERS = ("_orig_mod.", "_forward_module.")  # torch.compile, Fabric


class Instrument(Protocol):
    """One aspect of a model, measured again and again on the same probe.

    `start` comes first and may come again (a resumed run); the first `measure` takes
    the references that later ones compare with. A state holds tensors, numbers, texts
    and containers of these alone, so that `torch.load(weights_only=True)` reads it.
    """

    name: str
    """Group of the tags of its measurements."""

    def start(self, probe: Probe) -> None:
        """Take the probe; compare with restored references if there are any."""

    def measure(self, model: nn.Module, step: int) -> Measurement:
        """Measure the model after `step` optimizer updates."""

    def state_dict(self) -> dict[str, Any]:
        """References and sums that later measurements need."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""


def tag_name(name: str) -> str:
    """A parameter or module name as part of a tag that every logger accepts."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name) or "root"


def checked_name(name: str) -> str:
    """The name of a group of tags, if every logger accepts it.

    Args:
        name: What a user calls a monitor.

    Returns:
        The same name.

    Raises:
        ValueError: If it holds other characters than letters, digits, _ . / and -.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_./-]+", name):
        raise ValueError(
            f"name={name!r} becomes part of tags; expected letters, digits and any of "
            "_ . / -"
        )
    return name


def monitor_tag(what: str, name: str) -> str:
    """Tag of a number about the measuring itself, by the group that was measured."""
    return f"monitor/{what}" if name == "ntk" else f"monitor/{what}_{name}"


def one_of(argument: str, value: object, valid: tuple[str, ...]) -> None:
    """Raise ValueError, before any training, unless the value is a valid one."""
    if value not in valid:
        raise ValueError(f"{argument}={value!r}; expected one of {', '.join(valid)}.")


def chosen_options(options: object, kind: type[_Options], **given: object) -> _Options:
    """The options that were given, or the default ones.

    Args:
        options: Of that kind, or None.
        kind: Class of the options.
        **given: Options that were given by keyword, which go before; None is none.

    Returns:
        Options of that kind.

    Raises:
        ValueError: If it is anything else, such as a mapping from a configuration.
    """
    if options is None:
        options = kind()
    if not isinstance(options, kind):
        raise ValueError(
            f"options={options!r}; expected {kind.__name__}(…), in a configuration "
            f"_target_: ntk_callbacks.{kind.__name__} beside the keys."
        )
    changes = {name: value for name, value in given.items() if value is not None}
    return replace(options, **changes) if changes else options


def numbers(found: Mapping[str, Tensor | float | None]) -> dict[str, float]:
    """Scalars as Python floats, which every logger takes; None is left out."""
    return {tag: float(value) for tag, value in found.items() if value is not None}

"""Lightning's two names, and which of them a monitor has to be a callback of.

`lightning.pytorch` and `pytorch_lightning` are copies of one another, and Lightning
refuses programs that mix them. Loading the one that nobody uses takes as long as many
measurements do, so it is loaded only where it cannot be told which one that is.
"""

import sys
from importlib import import_module

_OTHER = "pytorch_lightning"
# Asked before the import below, through which all modules of monitors get Lightning: a
# program that loaded this one of the two, and not the other, uses this one.
_decided = "lightning.pytorch" in sys.modules or _OTHER in sys.modules

from lightning.pytorch import Callback, LightningModule  # noqa: E402
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn  # noqa: E402

__all__ = [
    "Callback",
    "be_callback_of_both",
    "module_classes",
    "rank_zero_info",
    "rank_zero_warn",
]

if not _decided:
    import_module(_OTHER)


def be_callback_of_both(monitor: type[Callback]) -> None:
    """Make a class a `Callback` of the other name too, as soon as that is loaded.

    So that trainers of either name accept a monitor, alone or in a list, and
    LightningCLI too. To be called when the class is there, and again before each of its
    objects is: a program may turn to the other name in between.

    Args:
        monitor: A subclass of `Callback`.
    """
    other = getattr(sys.modules.get(_OTHER), "Callback", None)
    if other is not None and not issubclass(monitor, other):
        monitor.__bases__ = (*monitor.__bases__, other)


def module_classes() -> list[type]:
    """The `LightningModule` of each name that is loaded: others have no objects."""
    other = getattr(sys.modules.get(_OTHER), "LightningModule", None)
    return [LightningModule] if other is None else [LightningModule, other]

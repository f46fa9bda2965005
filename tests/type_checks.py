"""The run-time checks of types and shapes that tests switch on, each made once.

A function inside a function is decorated at every call of the outer one, and its checks
take longer to make than most calls do. They see nothing but the arguments and the
result, so that those of one text and signature serve for all.
"""

import inspect
from collections.abc import Callable
from typing import Any

from beartype import beartype

_made: dict[tuple[Any, ...], Callable[..., Any]] = {}


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`beartype` of the functions that jaxtyping makes of signatures alone."""
    if "<locals>" not in function.__qualname__:
        return beartype(function)
    key = function.__module__, function.__qualname__, inspect.signature(function)
    if key not in _made:
        _made[key] = beartype(function)
    return _made[key]

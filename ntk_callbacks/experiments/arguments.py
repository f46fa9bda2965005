"""What a callable would refuse, found out without calling it.

A configuration is plain data, so its values are compared with the annotations: names
that do not exist, and numbers, strings, flags and lists where something else belongs.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePath
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

Target = Callable[..., Any]


def argument_names(target: Target) -> list[str]:
    """Keywords of a callable; empty if it has no signature or takes any keyword.

    Args:
        target: A class or function.

    Returns:
        Names in the order of the signature.
    """
    parameters = _parameters(target)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return []
    return [name for name, p in parameters.items() if p.kind is not p.VAR_POSITIONAL]


def wrong_arguments(target: Target, given: Mapping[str, Any]) -> list[str]:
    """One sentence per keyword that `target` does not know or whose type is wrong.

    Values that are None or hold objects are left to the target, and so are annotations
    that plain data cannot decide.

    Args:
        target: A class or function.
        given: Keyword -> number, string, flag, list, or mapping.

    Returns:
        The sentences; empty if nothing is known to be wrong.

    Example:
        >>> def scale(factor: float, mode: Literal["up", "down"] = "up") -> None: ...
        >>> wrong_arguments(scale, {"facto": 2})
        ['facto does not exist; did you mean factor? Valid: factor, mode.']
        >>> wrong_arguments(scale, {"mode": "left"})
        ["mode is 'left', expected one of up, down."]
    """
    names = argument_names(target)
    parameters = _parameters(target)
    wrong = []
    for name, value in given.items():
        if names and name not in names:
            wrong.append(f"{name} does not exist{choices(name, names)}")
        elif name in parameters and not _fits(value, parameters[name].annotation):
            wanted = _describe(parameters[name].annotation)
            wrong.append(f"{name} is {value!r}, expected {wanted}.")
    return wrong


def choices(given: str, valid: Iterable[str]) -> str:
    """End of a sentence that offers the nearest valid name and lists them all.

    Args:
        given: What was written.
        valid: What could have been written.

    Returns:
        Text that begins with a semicolon or a full stop.

    Example:
        >>> choices("mpl", ["cnn", "mlp"])
        '; did you mean mlp? Valid: cnn, mlp.'
    """
    valid = list(valid)
    near = difflib.get_close_matches(given, valid, n=1)
    guess = f"; did you mean {near[0]}?" if near else "."
    return f"{guess} Valid: {', '.join(valid)}."


def _parameters(target: Target) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(target, eval_str=True).parameters
    except NameError:  # an annotation that only exists for type checkers
        return inspect.signature(target).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return {}


def _fits(value: Any, annotation: Any) -> bool:
    origin = get_origin(annotation)
    if origin in {Union, UnionType}:
        return any(_fits(value, option) for option in get_args(annotation))
    if origin is Literal:
        return value in get_args(annotation)
    if value is None or not isinstance(value, (bool, int, float, str, list)):
        return True
    kind = origin or annotation
    if kind in {int, float} and isinstance(value, bool):
        return False
    if kind is Any or not isinstance(kind, type):  # a type variable, a bare name
        return True
    allowed: dict[type, tuple[type, ...]] = {float: (int, float), tuple: (list,)}
    if issubclass(kind, PurePath):
        return isinstance(value, str)
    return isinstance(value, allowed.get(kind, kind))


def _describe(annotation: Any) -> str:
    if get_origin(annotation) in {Union, UnionType}:
        options = [o for o in get_args(annotation) if o is not NoneType]
        return " or ".join(_describe(option) for option in options)
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(map(str, get_args(annotation)))}"
    return getattr(annotation, "__name__", str(annotation))

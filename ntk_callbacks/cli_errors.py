"""Where the configuration lies, and what is wrong with it, in a user's words."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from hydra.utils import get_object
from omegaconf import DictConfig
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
)

from ntk_callbacks.experiments.arguments import (
    argument_names,
    choices,
    wrong_arguments,
)


class ConfigurationError(ValueError):
    """The run cannot start as configured; the message names the key and the remedy."""


def conf_dir() -> Path:
    """Directory of the configuration.

    Returns:
        `conf/` of the checkout if the package lies in one, else the copy that the wheel
        carries inside the package.
    """
    package = Path(__file__).resolve().parent
    checkout = package.parent / "conf"
    return checkout if (checkout / "train.yaml").is_file() else package / "conf"


@contextmanager
def explained() -> Iterator[None]:
    """Turn whatever a configuration raises into a `ConfigurationError`."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigurationError(explanation(error)) from error
    except (ValueError, OSError, ImportError) as error:
        raise ConfigurationError(str(error)) from error


def explanation(error: Exception) -> str:
    """What went wrong in Hydra or OmegaConf, with the valid names."""
    cause = error.__cause__
    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={option} does not exist{choices(option, error.options)}"
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        return _key_explanation(cause)
    if isinstance(error, InstantiationException) and cause is not None:
        _, _, path = str(error).rpartition("full_key: ")
        return f"{path}: {cause}" if "full_key: " in str(error) else str(cause)
    if isinstance(error, InterpolationResolutionError):
        return _interpolation_explanation(error)
    return str(error)


def _interpolation_explanation(error: OmegaConfBaseException) -> str:
    """The sentence of our resolver, or that of OmegaConf without its own terms."""
    inner: BaseException | None = error
    while isinstance(inner, OmegaConfBaseException):
        inner = inner.__cause__ or inner.__context__
    if isinstance(inner, ValueError | OSError):
        return str(inner)
    sentence = str(error).partition("\n    full_key: ")[0]
    sentence = sentence.rpartition("raised while resolving interpolation: ")[2]
    return f"{error.full_key}: {sentence}" if error.full_key else sentence


def _key_explanation(error: ConfigKeyError | ConfigAttributeError) -> str:
    node, key = error.parent_node, str(error.key)
    if not isinstance(node, DictConfig):
        return str(error)
    path = str(error.full_key).rpartition(".")[0]
    valid = [str(k) for k in node if not str(k).startswith("_")]
    if not path:
        groups = sorted(p.name for p in conf_dir().iterdir() if p.is_dir())
        valid = sorted({*valid, *groups} - {"hydra"})
    elif "_target_" in node:
        names = argument_names(get_object(node["_target_"]))
        if key in names:
            wrong = wrong_arguments(get_object(node["_target_"]), _overrides(path, key))
            unset = f"{path} does not set {key} by default, write +{error.full_key}=…"
            return " Also, ".join([unset, *wrong])
        valid += [name for name in names if name not in valid]
    return f"{error.full_key} does not exist{choices(key, valid)}"


def _overrides(path: str, key: str) -> dict[str, Any]:
    """What the command line says for a key; empty if nothing, or a sweep."""
    words = [word for word in sys.argv[1:] if word.startswith(f"{path}.{key}=")]
    found = OverridesParser.create().parse_overrides(words)
    values = [word.value() for word in found if not word.is_sweep_override()]
    return {key: values[-1]} if values else {}

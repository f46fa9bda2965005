"""A run of `ntk-train` made again from the configuration that it left behind."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch import seed_everything
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

_IGNORED = ("_target_", "every", "history")  # where and when a replay measures is known


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured, and what is known of how.

    Args:
        model: Takes the weights of the checkpoints.
        loader: Of the training examples, to draw probes from; None if unknown.
        monitors: Name below `callbacks` -> arguments.
        initialized: Whether the model is as it was before the first update.
    """

    model: nn.Module
    loader: Any = None
    monitors: dict[str, dict[str, Any]] = field(default_factory=dict)
    initialized: bool = False


def rebuilt(path: Path, run: Path) -> Subject:
    """Model and data of a run, by its configuration and its seed.

    Args:
        path: The configuration that Hydra noted.
        run: Folder of the run, where it lies now.

    Returns:
        The parts; the global generators are seeded as the run seeded them.

    Raises:
        ValueError: If it is not the configuration of a run that trains a model.
    """
    try:
        config: Any = OmegaConf.load(path)
        config.run_dir = str(run)
        plain: Any = OmegaConf.to_container(config, resolve=True)
        seed_everything(plain["seed"], workers=True, verbose=False)
        data = instantiate(plain["data"], _convert_="all")
        data.prepare_data()
        facts = {"in_shape": list(data.shape), "out_features": data.classes}
        missing = {k: v for k, v in facts.items() if plain["model"].get(k, v) is None}
        model = instantiate({**plain["model"], **missing}, _convert_="all")
        optimizer = instantiate(plain["optimizer"], _convert_="all")
        task = instantiate({**plain["task"], "_partial_": True}, _convert_="all")
        module = task(model=model, optimizer=optimizer, classes=data.classes)
        data.setup("fit")
        monitors = {
            name: {k: _made(v) for k, v in node.items() if k not in _IGNORED}
            for name, node in (plain["callbacks"] or {}).items()
            if node
        }
    except (OmegaConfBaseException, KeyError, TypeError, AttributeError) as error:
        words = " ".join(str(error).split())
        raise ValueError(
            f"{str(path)!r} is not the configuration of a run of ntk-train "
            f"({type(error).__name__}: {words})."
        ) from error
    return Subject(module, data.train_dataloader(), monitors, initialized=True)


def _made(value: Any) -> Any:
    nested = isinstance(value, dict) and "_target_" in value
    return instantiate(value, _convert_="all") if nested else value

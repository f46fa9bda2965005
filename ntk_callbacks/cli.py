"""`ntk-train`: composes a run from `conf/`, checks it and trains it.

Everything that can be known to be wrong is refused before training, in a few lines that
name the key, the value and the valid ones. HYDRA_FULL_ERROR=1 shows the traceback.
"""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ntk_callbacks.cli_errors import (
    ConfigurationError,
    conf_dir,
    explained,
    explanation,
)
from ntk_callbacks.experiments.arguments import choices, wrong_arguments
from ntk_callbacks.experiments.resume import (
    CHECKPOINTS,
    LAST,
    existing_checkpoint,
    run_directory,
)

if TYPE_CHECKING:
    from ntk_callbacks.experiments.run import Run

KEYS = (
    *("model", "data", "task", "optimizer", "trainer", "callbacks", "logger"),
    *("checkpoint", "name", "seed", "ckpt", "run_dir"),
    *("study", "check", "scale", "scales", "strict"),
)


def main() -> None:
    """Entry point of `ntk-train`; reads `sys.argv`."""
    traceback = os.environ.get("HYDRA_FULL_ERROR")
    begun = False

    def task(config: DictConfig) -> float | None:
        from ntk_callbacks.experiments.run import train

        nonlocal begun
        begun = True
        try:
            if config.study is not None:
                return study(config)
            run = build(config)
        except ConfigurationError as error:
            if traceback == "1":
                raise
            # SystemExit also ends a sweep, whose other jobs likely share the mistake.
            sys.exit(f"ntk-train: {error}")
        return train(run)

    register_resolver()
    command = hydra.main(
        version_base="1.3", config_path=str(conf_dir()), config_name="train"
    )(task)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then leaves the report to us
    try:
        command()
    except (HydraException, OmegaConfBaseException) as error:
        if traceback == "1":
            raise
        sys.exit(f"ntk-train: {explanation(error)}")
    except OSError as error:
        if begun or traceback == "1":
            raise
        sys.exit(
            f"ntk-train: the directory of the run cannot be made: {error}. Choose "
            "another by hydra.run.dir=<folder>, of a sweep by hydra.sweep.dir=<folder> "
            "or, where names are too long, hydra.sweep.subdir='${hydra.job.num}'."
        )
    except KeyboardInterrupt:  # during training Lightning answers it
        print("ntk-train: interrupted.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    finally:
        del os.environ["HYDRA_FULL_ERROR"]
        if traceback is not None:
            os.environ["HYDRA_FULL_ERROR"] = traceback


def register_resolver() -> None:
    """Teach OmegaConf `${run_directory:name,ckpt,time}`, used in `conf/train.yaml`."""
    OmegaConf.register_new_resolver(
        "run_directory",
        lambda name, ckpt, time: str(run_directory(str(name), ckpt, time)),
        replace=True,
        use_cache=True,  # a new directory stays the one of this run once it is made
    )


def build(config: DictConfig) -> "Run":
    """Make everything a run needs, and refuse whatever would fail later.

    Args:
        config: The composed configuration, see `conf/train.yaml`.

    Returns:
        The run, ready to be trained.

    Raises:
        ConfigurationError: If a key, a value, a file or a package is wrong or missing.
    """
    with explained():
        plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        _check(plain)
        return _build(plain)


def study(config: DictConfig) -> float | None:
    """Run an experiment that is a study.

    Args:
        config: The composed configuration.

    Returns:
        1 if all checks hold, else 0.

    Raises:
        ConfigurationError: If a key, a value or a package is wrong or missing.
    """
    from ntk_callbacks.cli_study import run

    with explained():
        plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        _check(plain)
        return run(plain, [*HydraConfig.get().overrides.task])


def _build(config: dict[str, Any]) -> "Run":
    from lightning.pytorch import seed_everything
    from lightning.pytorch.utilities import rank_zero_only

    from ntk_callbacks.experiments.resume import check_checkpoint
    from ntk_callbacks.experiments.run import Run, tidy_output

    tidy_output()
    seed_everything(config["seed"], workers=True, verbose=False)
    data = _make("data", config["data"])
    data.prepare_data()
    if not (hasattr(data, "shape") and hasattr(data, "classes")):
        raise ConfigurationError(
            f"data: {type(data).__name__} must say its `shape`, that of one input, and "
            "its `classes`, how many there are; the model is built from them."
        )
    facts = {"in_shape": list(data.shape), "out_features": data.classes}
    missing = {k: v for k, v in facts.items() if config["model"].get(k, v) is None}
    model = _make("model", {**config["model"], **missing})
    _make("optimizer", config["optimizer"], params=model.parameters())  # only to see
    optimizer = instantiate(config["optimizer"], _convert_="all")
    module = _make(
        "task", config["task"], model=model, optimizer=optimizer, classes=data.classes
    )
    checkpoint = _checkpoint(config)
    callbacks = {
        **{f"callbacks.{k}": v for k, v in (config["callbacks"] or {}).items()},
        "checkpoint": config["checkpoint"],
    }
    trainer = _make(
        "trainer",
        config["trainer"],
        callbacks=[_make(path, node) for path, node in callbacks.items() if node],
        logger=_make("logger", config["logger"]) if config["logger"] else False,
    )
    if checkpoint is not None:
        note = check_checkpoint(checkpoint, module, trainer.max_epochs)
        rank_zero_only(print)(note)
    for logger in trainer.loggers:
        logger.log_hyperparams({key: config[key] for key in KEYS if key != "run_dir"})
    command = ["ntk-train", *HydraConfig.get().overrides.task]
    return Run(trainer, module, data, checkpoint, command)


def _make(path: str, node: dict[str, Any], **objects: Any) -> Any:
    # Objects are passed by a call, since `instantiate` would copy them.
    target = instantiate({**node, "_partial_": True}, _convert_="all")
    try:
        return target(**objects)
    except Exception as error:  # whatever a constructor raises
        raise ConfigurationError(f"{path}: {error}") from error


def _checkpoint(config: dict[str, Any]) -> Path | None:
    ckpt = config["ckpt"]
    if ckpt != "last":
        return None if ckpt is None else existing_checkpoint(ckpt)
    if HydraConfig.get().mode is RunMode.MULTIRUN:
        raise ConfigurationError(
            "ckpt=last goes on with one run and a sweep is many; "
            "leave out -m, or give ckpt=<path> of one of them."
        )
    # Hydra was given the directory of the newest run by the resolver.
    return existing_checkpoint(Path(config["run_dir"], CHECKPOINTS, LAST))


def _check(config: dict[str, Any]) -> None:
    """Compare every key with the signature of the object it is meant for."""
    wrong = [
        f"{key} is no key of a run{choices(str(key), KEYS)}"
        for key in config
        if key not in KEYS
    ]
    for path, node in _nodes(config):
        try:
            target = get_object(node["_target_"])
        except (ImportError, ValueError) as error:
            wrong.append(f"{path}._target_: {error}")
            continue
        given = {k: v for k, v in node.items() if not str(k).startswith("_")}
        wrong += [f"{path}.{fault}" for fault in wrong_arguments(target, given)]
    seed = config["seed"]
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        wrong.append(f"seed is {seed!r}, expected a whole number in [0, 2³²).")
    if wrong:
        raise ConfigurationError("\n".join(wrong))


def _nodes(config: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(config, dict):
        if "_target_" in config:
            yield path, config
        for key, value in config.items():
            yield from _nodes(value, f"{path}.{key}" if path else str(key))


if __name__ == "__main__":
    main()

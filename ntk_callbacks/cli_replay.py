"""`ntk-replay`: the history of a run, measured from its checkpoints."""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

import ntk_callbacks
from ntk_callbacks.callbacks.replay import Replay
from ntk_callbacks.callbacks.saved_weights import by_step, load_weights
from ntk_callbacks.cli_rebuild import Subject, rebuilt
from ntk_callbacks.reporting.history import load_history
from ntk_callbacks.reporting.history_file import FOLDER
from ntk_callbacks.reporting.summary import summary_table

MONITORS = {
    "ntk": "NTKMonitor",
    "params": "ParameterDriftMonitor",
    "jacobian": "JacobianMonitor",
    "signal": "SignalMonitor",
    "features": "FeatureMonitor",
    "linearization": "LinearizationMonitor",
}
"""Name, as in `callbacks=…` of `ntk-train` -> monitor that needs only weights."""

_DESCRIPTION = """\
Measure the checkpoints of a run as if monitors had been there, and keep what they
measure in <out>/ntk_history, which load_history and ntk-report read."""
_EPILOG = """\
ntk-replay outputs/mlp/2026-11-25_10-00-00
ntk-replay checkpoints/*.ckpt --model my_project.models:Net --probe probe.pt

Of a run of ntk-train, model, data and settings of the monitors come from its
configuration, and step 0 is measured too: its seed gives the initialization again.
Of other runs, changes are measured from the first checkpoint on."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `ntk-replay`.

    Args:
        arguments: Words of the command line; those of the process by default.
    """
    options = _parser().parse_args(arguments)
    try:
        print(_replay(options))
    except Exception as error:  # of the user's model, too
        if options.traceback:
            raise
        words = " ".join(str(error).split())
        known = isinstance(error, OSError | ValueError)
        kind = "" if known else f"{type(error).__name__}: "
        sys.exit(f"ntk-replay: {kind}{words}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ntk-replay",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        *("checkpoints",),
        nargs="+",
        type=Path,
        metavar="CKPT",
        help="a checkpoint, or a folder: that of a run, or any with .ckpt files in it",
    )
    parser.add_argument(
        "--probe",
        metavar="FILE",
        help="a probe that Probe.save wrote; for runs of ntk-train by default what "
        "their monitors draw from the training data",
    )
    parser.add_argument(
        "--model",
        metavar="PACKAGE.MODULE:NAME",
        help="a LightningModule that saved its hyperparameters, or a function without "
        "arguments that returns the model; not needed for runs of ntk-train",
    )
    parser.add_argument(
        "--monitors",
        default="ntk,params,jacobian",
        metavar="NAMES",
        help=f"any of {','.join(MONITORS)} (default: %(default)s)",
    )
    parser.add_argument(
        *("-o", "--out"),
        type=Path,
        metavar="FOLDER",
        help="where ntk_history is written (default: replay in the folder of the run); "
        "an earlier replay there is superseded",
    )
    parser.add_argument(
        "--trust",
        action="store_true",
        help="read checkpoints that hold more than tensors and plain data: they can "
        "run any code",
    )
    parser.add_argument(
        "--traceback", action="store_true", help="show where an error comes from"
    )
    return parser


def _replay(options: argparse.Namespace) -> str:
    names = _checked_monitors(options.monitors)
    given = _files(options.checkpoints)
    run = _run_folder(given)
    files = by_step(given, options.trust)
    subject = _subject(options, run, next(iter(files.values())))
    folder = options.out or run / "replay"
    _refuse_run(folder)
    replays = [
        Replay(
            _monitor(name, subject.monitors.get(name, {}), options.probe),
            folder,
            subject.loader,
        )
        for name in names
    ]
    histories: list[list[tuple[int, dict[str, float]]]] = [[] for _ in replays]
    found: dict[int, Path | None] = {0: None} if subject.initialized else {}
    for step, path in (found | files).items():
        if path is not None:
            load_weights(subject.model, path, options.trust)
        print(f"step {step}: {path or 'initialization'}", file=sys.stderr)
        for replay, history in zip(replays, histories, strict=True):
            history.append((step, _scalars(replay, subject.model, step)))
    return f"{summary_table(histories)}\n\nHistory: {folder / FOLDER}"


def _scalars(replay: Replay, model: nn.Module, step: int) -> dict[str, float]:
    try:
        return replay.measure(model, step).scalars
    except Exception as error:
        name = type(replay.monitor).__name__
        words = " ".join([str(error), *getattr(error, "__notes__", [])])
        raise ValueError(f"{name}, step {step}: {words}") from error


def _subject(options: argparse.Namespace, run: Path, first: Path) -> Subject:
    if options.model is not None:
        return Subject(_model(options.model, first, options.trust))
    config = run / ".hydra" / "config.yaml"
    if config.is_file():
        return rebuilt(config, run)
    raise ValueError(
        f"{str(run)!r} is no run of ntk-train, so --model is needed: its "
        "LightningModule, or a function that returns the model."
    )


def _checked_monitors(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name == "prediction":
            raise ValueError(
                "--monitors: prediction needs the gradients of a step, which no "
                "checkpoint holds."
            )
        if name not in MONITORS:
            raise ValueError(f"--monitors: {name!r} is none of {', '.join(MONITORS)}.")
    if not names:
        raise ValueError(f"--monitors: expected some of {', '.join(MONITORS)}.")
    return [*dict.fromkeys(names)]


def _monitor(name: str, settings: dict[str, Any], probe: str | None) -> Any:
    if probe is not None and name != "params":
        settings = {**settings, "probe": probe}
    kind = getattr(ntk_callbacks, MONITORS[name])
    try:
        return kind(**settings)
    except TypeError as error:
        raise ValueError(f"{MONITORS[name]}: {error}") from error


def _files(paths: Sequence[Path]) -> list[Path]:
    """The checkpoints in folders, in the order of their names."""
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(path.glob("*.ckpt")) or sorted(path.glob("checkpoints/*.ckpt"))
        if not inside:
            raise ValueError(f"{str(path)!r} holds no .ckpt file.")
        found += inside
    return found


def _run_folder(files: Sequence[Path]) -> Path:
    """Folder of the run that wrote the checkpoints; all are to be of one."""
    folders = {file.resolve().parent for file in files}
    runs = sorted({f.parent if f.name == "checkpoints" else f for f in folders})
    if len(runs) > 1:
        raise ValueError(
            f"the checkpoints are of several runs: {', '.join(map(str, runs))}. Replay "
            "one after the other."
        )
    return runs[0]


def _refuse_run(folder: Path) -> None:
    """Leave the history of the run itself alone."""
    if not any((folder / FOLDER).glob("*.jsonl")):
        return
    try:
        known = load_history(folder).conventions
    except (OSError, ValueError):  # nothing complete is in it
        return
    if not all(found.get("replayed") for found in known.values()):
        raise ValueError(
            f"{str(folder / FOLDER)!r} holds what a run measured itself; choose "
            "another --out."
        )


def _model(target: str, first: Path, trust: bool) -> nn.Module:
    module_name, _, name = target.partition(":")
    if not name:
        raise ValueError(
            f"--model {target!r}: expected package.module:Class or …:function."
        )
    if "" not in sys.path:
        sys.path.insert(0, "")  # as with `python -m`, what lies here can be imported
    try:
        found: Any = getattr(import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--model {target!r}: {error}.") from error
    model = _called(found, target, first, trust)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"--model {target!r} returned a {type(model).__name__}; expected a module."
        )
    return model


def _called(found: Any, target: str, first: Path, trust: bool) -> Any:
    load: Callable[..., Any] | None = getattr(found, "load_from_checkpoint", None)
    if load is None:
        try:
            return found()
        except Exception as error:  # of the user's code
            why = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"--model {target!r} cannot be called ({why}). Give a function without "
                "arguments that returns the model."
            ) from error
    try:
        return load(first, map_location="cpu", weights_only=not trust)
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"--model {target!r} cannot be built from {str(first)!r} ({error}). Give a "
            "function that returns the model: --model package.module:function."
        ) from error


if __name__ == "__main__":
    main()

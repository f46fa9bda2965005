"""`ntk-report`: one HTML page that compares the histories of runs."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ntk_callbacks.reporting.history import RunHistory, history_folders, load_history
from ntk_callbacks.reporting.report_page import report_page


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `ntk-report`.

    Args:
        arguments: Words of the command line; those of the process by default.
    """
    parser = argparse.ArgumentParser(
        prog="ntk-report",
        description="Write one self-contained HTML page that compares runs.",
        epilog="ntk-report outputs/mlp/* -o widths.html",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="folder of a run, or a folder of runs such as that of a sweep",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="the page (default: report.html); a file of that name is replaced",
    )
    options = parser.parse_args(arguments)
    try:
        print(_write(options.runs, options.output))
    except (OSError, ValueError) as error:
        sys.exit(f"ntk-report: {error}")


def _write(paths: Sequence[Path], output: Path) -> str:
    folders = _folders(paths)
    histories: dict[Path, RunHistory] = {}
    for folder in folders:
        try:
            histories[folder] = _readable(folder)
        except (OSError, ValueError) as error:
            if len(folders) == 1:
                raise
            print(f"ntk-report: left out: {error}", file=sys.stderr)
    if not histories:
        raise ValueError("no run has a complete measurement.")
    names = dict(zip(histories, run_names([*histories]), strict=True))
    page = report_page(
        {names[folder]: history for folder, history in histories.items()},
        {names[folder]: _overrides(folder) for folder in histories},
    )
    try:
        # Names of folders may be no valid text.
        output.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        why = error.strerror or error
        raise OSError(f"{str(output)!r} cannot be written: {why}.") from error
    return f"{output}: {len(histories)} run{'s' * (len(histories) > 1)}"


def _readable(folder: Path) -> RunHistory:
    history, lost = load_history(folder).intact()
    if lost:
        print(
            f"ntk-report: left out: spectra of {lost} measurement{'s' * (lost > 1)} in "
            f"{str(folder)!r}, whose files are gone or damaged. Copy the whole folder "
            "of a history.",
            file=sys.stderr,
        )
    return history


def _folders(paths: Sequence[Path]) -> list[Path]:
    found: dict[Path, Path] = {}
    for path in paths:
        # Of a folder without any, `load_history` says what is wrong.
        for folder in history_folders(path) or [path]:
            found.setdefault(folder.resolve(), folder)
    return [*found.values()]


def run_names(folders: Sequence[Path]) -> list[str]:
    """Short names that tell the runs apart: their paths without what is common.

    Runs of one sweep are called by the settings in which they differ.

    Args:
        folders: Different folders.

    Returns:
        One name for each.

    Example:
        >>> run_names([Path("out/mlp/08-00/a"), Path("out/cnn/08-00/a")])
        ['mlp/08-00/a', 'cnn/08-00/a']
        >>> run_names([Path("out/mlp/08-00")])
        ['08-00']
        >>> run_names([Path("sweep/0_lr=1,width=8"), Path("sweep/1_lr=1,width=9")])
        ['width=8', 'width=9']
    """
    # A link is called as its user calls it.
    whole = [(f.resolve() if ".." in f.parts else f.absolute()).parts for f in folders]
    shared = 0
    while all(len(parts) > shared + 1 for parts in whole) and (
        len({parts[shared] for parts in whole}) == 1
    ):
        shared += 1
    if len(whole) == 1:
        return [whole[0][-1]]
    names = ["/".join(parts[shared:]) for parts in whole]
    settings = [re.sub(r"^\d+_", "", name).split(",") for name in names]
    common = set.intersection(*map(set, settings))
    differing = [",".join(s for s in each if s not in common) for each in settings]
    distinct = all(differing) and len(set(differing)) == len(names)
    return differing if distinct and all("=" in name for name in names) else names


def _overrides(folder: Path) -> str:
    """The words after `ntk-train`, where Hydra noted them: a list, one on each line."""
    path = folder / ".hydra" / "overrides.yaml"
    if not path.is_file():
        return ""
    lines = path.read_text("utf-8", errors="replace").splitlines()
    words = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
    return " ".join(["ntk-train", *words])


if __name__ == "__main__":
    main()

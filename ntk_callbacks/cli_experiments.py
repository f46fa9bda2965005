"""`ntk-experiments`: every study from its own command, and one table of what they find.

A study that was run into the same folder before goes on where it stopped; one that is
finished is only read.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ntk_callbacks.cli_errors import conf_dir


@dataclass(frozen=True)
class Finished:
    """What a study's command left behind.

    Args:
        name: Of the experiment.
        folder: Where its figure lies.
        found: The content of its `findings.json`; None if it has none.
        output: What it printed.
    """

    name: str
    folder: Path
    found: dict[str, Any] | None
    output: str

    @property
    def passed(self) -> bool:
        """Whether it ended and all of its checks hold."""
        checks = self.found["checks"] if self.found else []
        return self.found is not None and all(check["passed"] for check in checks)


def study_names() -> list[str]:
    """The experiments that are studies, in alphabetical order.

    Returns:
        Their names, as `experiment=` takes them.
    """
    files = sorted((conf_dir() / "experiment").glob("*.yaml"))
    return [path.stem for path in files if "study" in OmegaConf.load(path)]


def run_one(name: str, folder: Path, words: Sequence[str], threads: int) -> Finished:
    """Run the command of a study to its end.

    Args:
        name: Of the experiment.
        folder: Its run directory.
        words: More overrides, for example `scale=smoke`.
        threads: Of the process.

    Returns:
        What it left.
    """
    findings = folder / "findings.json"
    findings.unlink(missing_ok=True)  # not those of an earlier run
    command = [sys.executable, "-m", "ntk_callbacks.cli", f"experiment={name}"]
    quoted = str(folder).replace("'", "\\'")
    process = subprocess.run(
        [*command, f"hydra.run.dir='{quoted}'", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    found = json.loads(findings.read_text("utf-8")) if findings.is_file() else None
    return Finished(name, folder, found, process.stdout)


def table(finished: Iterable[Finished]) -> str:
    """One row for each checked number, as Markdown.

    Args:
        finished: The studies.

    Returns:
        Lines of text.
    """
    lines = [
        "| command | minutes | figure | checked number | expected | measured | |",
        "|---|---|---|---|---|---|---|",
    ]
    for study in finished:
        command = f"`ntk-train experiment={study.name}`"
        if study.found is None:
            lines.append(f"| {command} | | | | | | **no result** |")
            continue
        minutes = f"{study.found['seconds'] / 60:.1f}"
        figure = str(study.folder / "figure.png")
        for check in study.found["checks"]:
            word = "ok" if check["passed"] else "**failed**"
            cells = check["name"], check["expected"], f"{check['measured']:.4g}", word
            row = command, minutes, figure, *cells
            lines.append(f"| {' | '.join(row)} |")
            command = minutes = figure = ""
    return "\n".join(lines)


def main() -> None:
    """Entry point of `ntk-experiments`; reads `sys.argv`."""
    parser = argparse.ArgumentParser(
        "ntk-experiments",
        description="Run the studies one by one, each as ntk-train experiment=<name>, "
        "and print what they find beside what was published.",
    )
    parser.add_argument("names", nargs="*", help="some of them; all by default")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("outputs/experiments"),
        help="each study is kept in a folder of it (default: %(default)s); one that is "
        "finished there is not run again",
    )
    parser.add_argument(
        *("--at-once",),
        type=int,
        default=2,
        metavar="N",
        help="studies at a time (default: %(default)s)",
    )
    parser.add_argument(
        *("--set",),
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="handed to each ntk-train, such as scale=smoke; may be repeated",
    )
    options = parser.parse_args()
    known = study_names()
    if unknown := [name for name in options.names if name not in known]:
        parser.error(
            f"no such study: {', '.join(unknown)}; there are {', '.join(known)}"
        )
    if options.at_once < 1:
        parser.error(f"--at-once {options.at_once}: expected at least 1")
    names = options.names or known
    threads = max(1, (os.cpu_count() or 1) // options.at_once)
    done: dict[str, Finished] = {}
    with ThreadPoolExecutor(options.at_once) as pool:
        try:
            waiting = [
                pool.submit(run_one, name, options.folder / name, options.set, threads)
                for name in names
            ]
            for future in as_completed(waiting):
                study = future.result()
                done[study.name] = study
                word = "ok" if study.passed else "FAILED"
                print(f"{len(done)}/{len(names)}  {study.name}  {word}", flush=True)
                if not study.passed:
                    print(study.output, flush=True)
        except KeyboardInterrupt:
            # Those that run were interrupted, too; the pool would start the rest.
            pool.shutdown(cancel_futures=True)
            print(
                "ntk-experiments: interrupted; the same command goes on with what is "
                "left.",
                file=sys.stderr,
            )
            sys.exit(128 + signal.SIGINT)
    print("\n" + table(done[name] for name in names))
    if not all(study.passed for study in done.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()

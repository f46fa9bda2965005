"""Run the jobs of a study, keep what each returns, and hold what is found to checks.

Results lie in `<run directory>/jobs/<name>.json`. A study that was interrupted goes on
with the jobs that are not there yet; one with other parameters is run again.
"""

import json
import random
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ntk_callbacks.experiments.resume import JOBS
from ntk_callbacks.studies.checks import Check, Verdict, verdict_lines, verdicts
from ntk_callbacks.studies.study import Findings, Result, Results, Study


@dataclass(frozen=True)
class Outcome:
    """What a study came to.

    Args:
        findings: Its table and numbers.
        verdicts: Its checks.
        seconds: Time that its jobs took, in this run or an earlier one.
        folder: Where figure, table and results lie.
    """

    findings: Findings
    verdicts: list[Verdict]
    seconds: float
    folder: Path

    @property
    def passed(self) -> bool:
        """Whether all checks hold."""
        return all(verdict.passed for verdict in self.verdicts)


def run_study(
    study: Study,
    folder: Path,
    *,
    checks: Mapping[str, Check],
    device: str = "cpu",
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Run a study from where it stands.

    Args:
        study: The experiment.
        folder: Its run directory.
        checks: What its numbers must be.
        device: Where to compute.
        seed: Changes the chance of every job.
        say: Takes lines of progress.

    Returns:
        What was found; also in `findings.json`, `table.txt`, `figure.png` and a
        TensorBoard image.

    Raises:
        ValueError: If the study has no jobs, a job returns a number under the name of
            one of its parameters, or a check names no number of the study.
    """
    jobs = study.jobs()
    if not jobs:
        raise ValueError(f"{type(study).__name__}: its parameters leave no job to run.")
    (folder / JOBS).mkdir(parents=True, exist_ok=True)
    results: dict[str, Result] = {}
    seconds = 0.0
    for index, (name, parameters) in enumerate(jobs.items(), 1):
        path = folder / JOBS / f"{name}.json"
        wanted = json.loads(json.dumps({**parameters, "seed_of_run": seed}))
        if (kept := _kept(path, wanted)) is None:
            start = time.perf_counter()
            _seed(name, seed)
            result = study.run(**parameters, device=device)
            took = time.perf_counter() - start
            if twice := ", ".join(sorted(wanted.keys() & result.keys())):
                raise ValueError(f"{name}: parameters and results both have {twice}.")
            kept = {"parameters": wanted, "result": result, "seconds": took}
            kept = _write(path, kept)
            say(f"{index}/{len(jobs)}  {name}  {took:.1f} s")
        else:
            say(f"{index}/{len(jobs)}  {name}  is there already")
        results[name] = {**kept["parameters"], **kept["result"]}
        seconds += kept["seconds"]
    findings = study.findings(results)
    found = verdicts(findings.numbers, checks)
    outcome = Outcome(findings, found, seconds, folder)
    _keep(outcome, study, results)
    return outcome


def lines(outcome: Outcome) -> list[str]:
    """The table and the checks as text.

    Args:
        outcome: Of a study.

    Returns:
        Lines of plain text.
    """
    rows = outcome.findings.table
    columns = list(rows[0]) if rows else []
    cells = [columns, *([_cell(row[c]) for c in columns] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    table = [
        "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        for row in cells
    ]
    return [*table, "", *verdict_lines(outcome.verdicts)]


def _cell(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _seed(name: str, seed: int) -> None:
    number = zlib.crc32(f"{seed} {name}".encode())
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002
    torch.manual_seed(number)


def _kept(path: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """What the job left, if it was this job and is whole."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    same = isinstance(found, dict) and found.get("parameters") == wanted
    return found if same else None


def _write(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """What will be read back; all or nothing, also if the process is killed."""
    draft = path.with_name(path.name + ".part")
    text = json.dumps(content)
    draft.write_text(text, "utf-8")
    draft.replace(path)
    return dict(json.loads(text))


def _keep(outcome: Outcome, study: Study, results: Results) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

    folder = outcome.folder
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    study.draw(results, figure)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    figure.savefig(folder / "figure.png")
    pixels = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
    image = torch.from_numpy(pixels[..., :3].copy())
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        writer.add_image("figure", image, 0, dataformats="HWC")
        for name, number in outcome.findings.numbers.items():
            writer.add_scalar(f"found/{name}", number, 0)
    text = "\n".join(lines(outcome)) + "\n"
    (folder / "table.txt").write_text(text, "utf-8")
    checked = [
        {
            "name": verdict.name,
            "measured": verdict.measured,
            "expected": verdict.check.expected,
            "source": verdict.check.source,
            "passed": verdict.passed,
        }
        for verdict in outcome.verdicts
    ]
    _write(
        folder / "findings.json",
        {
            "table": outcome.findings.table,
            "numbers": outcome.findings.numbers,
            "checks": checked,
            "seconds": outcome.seconds,
        },
    )


def scaled(
    parameters: Mapping[str, Any],
    scales: Mapping[str, Mapping[str, Any]],
    scale: str,
    given: set[str],
) -> dict[str, Any]:
    """Parameters of a study at another scale.

    Args:
        parameters: As configured.
        scales: What each scale changes.
        scale: `"default"` changes nothing.
        given: Names that the user set, which no scale changes.

    Returns:
        The parameters to use.

    Raises:
        ValueError: If there is no such scale.

    Example:
        >>> scaled({"width": 8, "seeds": 2}, {"paper": {"width": 512}}, "paper", set())
        {'width': 512, 'seeds': 2}
    """
    if scale == "default":
        return dict(parameters)
    if scale not in scales:
        names = ", ".join(["default", *scales])
        raise ValueError(f"scale={scale}: expected one of {names}.")
    changes = {k: v for k, v in scales[scale].items() if k not in given}
    return {**parameters, **changes}

"""One HTML page that compares runs: everything in it, nothing fetched."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from textwrap import shorten

from ntk_callbacks.reporting.history import RunHistory
from ntk_callbacks.reporting.report_axis import number
from ntk_callbacks.reporting.report_groups import HEADINGS, grouped, of_a_part
from ntk_callbacks.reporting.report_images import kernel_figures, spectrum_figures
from ntk_callbacks.reporting.report_meanings import (
    Meaning,
    meaning_of,
    meanings,
    readme,
    unit,
)
from ntk_callbacks.reporting.report_plot import COLORS, Curve, Labels, line_plot
from ntk_callbacks.reporting.report_style import STYLE

_STEPS = "completed optimizer updates"
_CONVENTIONS = {
    "outputs": "outputs",
    "mode": "mode",
    "dtype": "dtype",
    "probe_examples": "examples",
    "probe_digest": "probe",
    "parameter_count": "weights",
    "seed": "seed",
    "version": "version",
}


def report_page(
    runs: Mapping[str, RunHistory], notes: Mapping[str, str] | None = None
) -> str:
    """An HTML page with a plot of every quantity and a curve of every run in it.

    Args:
        runs: Name -> history, at least one; names may hold any characters.
        notes: Name -> a sentence about that run, such as how it was started.

    Returns:
        The text of the page. It has no script and refers to no other file.

    Raises:
        ValueError: If there is no run.
    """
    if not runs:
        raise ValueError("report_page: expected at least one run, got none.")
    table = meanings(readme())
    tags = dict.fromkeys(tag for run in runs.values() for tag in run.scalars)
    vectors = dict.fromkeys(tag for run in runs.values() for tag in run.vectors)
    matrices = dict.fromkeys(tag for run in runs.values() for tag in run.matrices)
    groups = grouped([*tags, *vectors, *matrices])
    sections = [_section(key, found, runs, table) for key, found in groups.items()]
    links = "".join(f'<a href="#{key}">{_word(key)}</a>' for key in groups)
    title = f"{len(runs)} runs" if len(runs) > 1 else next(iter(runs))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)} · ntk_callbacks</title><style>{STYLE}</style></head>"
        f"<body><header><h1>{escape(title)}</h1>{_legend(runs)}<nav>{links}</nav>"
        f"</header><main>{_about(runs, notes or {})}{''.join(sections)}</main>"
        "</body></html>\n"
    )


def _word(key: str) -> str:
    return {"linear": "linearized", "other": "further"}.get(key, key)


def _legend(runs: Mapping[str, RunHistory]) -> str:
    entries = []
    for index, name in enumerate(runs):
        dash = ("", "6 3", "2 3", "9 3 2 3")[index // COLORS % 4]
        line = (
            f'<path class="run{index % COLORS}" d="M0 6H26" stroke-dasharray="{dash}"/>'
        )
        entries.append(
            f'<li><svg class="key" viewBox="0 0 26 12" aria-hidden="true">{line}</svg>'
            f"{escape(name)}</li>"
        )
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _about(runs: Mapping[str, RunHistory], notes: Mapping[str, str]) -> str:
    """What was measured in each run, and a warning where that differs."""
    rows = []
    for name, run in runs.items():
        for monitor, found in run.conventions.items():
            cells = [name, monitor, *(_cell(found.get(key)) for key in _CONVENTIONS)]
            rows.append(_row([*cells, notes.get(name, "")]))
    head = _row(["run", "monitor", *_CONVENTIONS.values(), "started with"], "th")
    table = f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"
    warnings = "".join(
        f'<p class="warning">{escape(text)}</p>' for text in _differences(runs)
    )
    return (
        f"<p>Each plot shows one quantity over the {_STEPS}; step 0 is the "
        "initialization. Point at a mark to read its value. Axes are logarithmic where "
        "the values span two decades.</p>"
        f"{warnings}<details><summary>What was measured in each run</summary>"
        f'<div class="wide">{table}</div></details>'
    )


def _differences(runs: Mapping[str, RunHistory]) -> list[str]:
    found = []
    for key, what in (
        ("probe_digest", "on different examples"),
        ("outputs", "for different outputs (full, traced, …)"),
        ("mode", "in different modes (eval, train)"),
    ):
        differing = []
        for monitor in dict.fromkeys(
            m for run in runs.values() for m in run.conventions
        ):
            values = {
                str(run.conventions[monitor].get(key))
                for run in runs.values()
                if monitor in run.conventions
            }
            if len(values) > 1:
                differing.append(f"{monitor}/…")
        if differing:
            verb = "was" if len(differing) == 1 else "were"
            names = ", ".join(differing)
            found.append(f"{names} {verb} measured {what}: compare with care.")
    return found


def _section(
    key: str,
    tags: Sequence[str],
    runs: Mapping[str, RunHistory],
    table: dict[str, Meaning],
) -> str:
    kept = {tag for run in runs.values() for tag in run.matrices}
    whole = [tag for tag in tags if not (of_a_part(tag) or tag in kept)]
    parts = [tag for tag in tags if of_a_part(tag)]
    plots = [_figure(f"{key}{i}", tag, runs, table) for i, tag in enumerate(whole)]
    pictures = [spectrum_figures(tag, runs) for tag in tags]
    pictures += [kernel_figures(tag, runs) for tag in tags]
    if parts:
        inner = [_figure(f"{key}p{i}", tag, runs, table) for i, tag in enumerate(parts)]
        plots_of_parts = (
            f"<details><summary>{len(parts)} curves of single parts</summary>"
            f'<div class="plots">{"".join(inner)}</div></details>'
        )
    else:
        plots_of_parts = ""
    scalars = [tag for tag in whole if any(tag in run.scalars for run in runs.values())]
    return (
        f'<section id="{key}"><h2>{HEADINGS[key]}</h2>'
        f'<div class="plots">{"".join(plots + pictures)}</div>{plots_of_parts}'
        f"{_last_values(scalars, runs, table)}</section>"
    )


def _figure(
    key: str, tag: str, runs: Mapping[str, RunHistory], table: dict[str, Meaning]
) -> str:
    meaning = meaning_of(tag, table)
    vectors = any(tag in run.vectors for run in runs.values())
    if vectors:
        curves, labels = _spectra(tag, runs)
    else:
        curves = [
            Curve(index, name, [*map(float, run[tag].steps)], [*run[tag].values])
            for index, (name, run) in enumerate(runs.items())
            if tag in run.scalars
        ]
        formula = meaning.formula.replace("`", "") or tag.rpartition("/")[2]
        about = f"{tag} of {len(curves)} runs over {_STEPS}."
        label = f"{shorten(formula, 56, placeholder=' …')} [{unit(tag)}]"
        labels = Labels(tag, about, _STEPS, label)
    gaps = sum(not math.isfinite(y) for curve in curves for y in curve.y)
    sentences = (
        [meaning.reading or labels.description] if vectors else [meaning.reading]
    )
    noun = "value that is" if gaps == 1 else "values that are"
    sentences += [f"Not drawn: {gaps} {noun} undefined or ∞."] if gaps else []
    caption = _markdown(". ".join(filter(None, sentences)))
    return (
        f"<figure><h3>{escape(tag)}</h3>{line_plot(curves, labels, key)}"
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _spectra(tag: str, runs: Mapping[str, RunHistory]) -> tuple[list[Curve], Labels]:
    """A vector at its first and its last step; spectra from the largest value down."""
    curves = []
    logarithms = tag.endswith("_log10")
    for index, (name, run) in enumerate(runs.items()):
        if tag not in run.vectors:
            continue
        series = run[tag]
        for which in (0, -1) if len(series.steps) > 1 else (-1,):
            values = [float(v) for v in series.values[which]]
            if logarithms:
                values = sorted((10.0**v for v in values), reverse=True)
            ranks = [float(i + 1) for i in range(len(values))]
            label = f"{name}, step {series.steps[which]}"
            curves.append(Curve(index, label, ranks, values, faint=which == 0))
    quantity = tag.rpartition("/")[2].removesuffix("_log10").replace("_", " ")
    about = "Dashed: the first measurement; solid: the last"
    across = "rank, from the largest" if logarithms else "position"
    return curves, Labels(tag, about, across, f"{quantity} [no unit]")


def _last_values(
    tags: Sequence[str], runs: Mapping[str, RunHistory], table: dict[str, Meaning]
) -> str:
    if not tags:
        return ""
    rows = []
    for tag in tags:
        meaning = meaning_of(tag, table)
        cells = [f"<th>{escape(tag)}</th><td>{_markdown(meaning.formula)}</td>"]
        cells.append(f"<td>{_markdown(meaning.range)}</td>")
        for run in runs.values():
            if tag in run.scalars:
                value, step = run[tag].values[-1], run[tag].steps[-1]
                cells.append(f'<td title="step {step}">{number(float(value))}</td>')
            else:
                cells.append("<td>–</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = _row(["last values", "formula", "range", *runs], "th")
    return (
        f'<div class="wide"><table><thead>{head}</thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _markdown(text: str) -> str:
    """Escaped text, with what stands in backticks as code."""
    parts = escape(text).split("`")
    return "".join(
        f"<code>{part}</code>" if index % 2 else part
        for index, part in enumerate(parts)
    )


def _row(cells: Sequence[str], tag: str = "td") -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _cell(value: object) -> str:
    text = "–" if value is None else str(value)
    return text[:8] if len(text) == 64 else text  # a digest

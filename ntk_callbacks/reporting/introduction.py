"""What TensorBoard is told once of a run: how to lay it out, what its curves mean."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from ntk_callbacks.reporting.loggers import attempted, named
from ntk_callbacks.reporting.report_groups import of_a_part
from ntk_callbacks.reporting.report_meanings import meaning_of, meanings, readme
from ntk_callbacks.reporting.scalar_layout import scalar_layout


def introduce(
    tags: Iterable[str], group: str, groups: Sequence[str], loggers: Iterable[Any]
) -> list[tuple[str, Exception]]:
    """Explain the curves of a monitor, and lay out those of the run.

    Args:
        tags: What the monitor measures.
        group: Its name; the text is called `<name>/curves`.
        groups: Names of all monitors of the run whose charts are to be laid out; empty
            if another monitor of the run did it.
        loggers: Those that do not write for TensorBoard are left alone.

    Returns:
        Name of each logger that raised, and what it raised.
    """
    failures: list[tuple[str, Exception]] = []
    text = curves_explained(tags)
    for name, logger in named(loggers):
        calls: list[Callable[[], object]] = []
        try:
            writer: Any = getattr(logger, "experiment", None)
            if groups and hasattr(writer, "add_custom_scalars"):
                layout = scalar_layout(groups)
                calls.append(partial(writer.add_custom_scalars, layout))
            if text and hasattr(writer, "add_text"):
                calls.append(partial(writer.add_text, f"{group}/curves", text, 0))
        except Exception as error:  # a logger may raise anything; the others go on
            failures.append((name, error))
        failures += [(name, error) for error in attempted(calls)]
    return failures


def curves_explained(tags: Iterable[str]) -> str:
    """What each curve means, as a Markdown table in the words of the README.

    Args:
        tags: Curves of single modules or tensors, and unknown ones, are left out.

    Returns:
        Markdown; empty if nothing is known of any.

    Example:
        >>> *_, row = curves_explained(["params/cosine_to_init"]).splitlines()
        >>> row.split(" | ")[1:]
        ['⟨θ,θ₀⟩/(‖θ‖‖θ₀‖)', '[−1, 1]', '1: only the scale changed |']
    """
    table = meanings(readme())
    rows = []
    for tag in tags:
        meaning = meaning_of(tag, table)
        if meaning.reading and not of_a_part(tag):
            cells = (meaning.formula, meaning.range, meaning.reading)
            escaped = (cell.replace("|", "\\|") for cell in cells)
            rows.append(f"| `{tag}` | {' | '.join(escaped)} |")
    if not rows:
        return ""
    head = ["| curve | formula | range | what to make of it |", "|---|---|---|---|"]
    return "\n".join([*head, *rows])

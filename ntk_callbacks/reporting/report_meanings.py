"""What each tag means, in the words of the README, whose table is the only copy."""

import re
from dataclasses import dataclass
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_UNITS = {
    "kernel_velocity": "1/update",
    "parting_step": "update",
    "seconds": "s",
    "subspace_angle": "rad",
    "twin_parting_step": "update",
    "xi_": "layers",
}


@dataclass(frozen=True, slots=True)
class Meaning:
    """One row of the table; Markdown with backticks, empty where nothing is known.

    Args:
        formula: What is computed.
        range: Which values there are.
        reading: What to make of it.
    """

    formula: str = ""
    range: str = ""
    reading: str = ""


def readme() -> str:
    """Text of the README: of the checkout, or the copy that the wheel carries."""
    for path in (_PACKAGE.parent / "README.md", _PACKAGE / "README.md"):
        if path.is_file() and (text := path.read_text("utf-8")).startswith("# ntk_"):
            return text
    return ""


def meanings(text: str) -> dict[str, Meaning]:
    r"""The rows of every Markdown table whose first column is called `tag`.

    Args:
        text: Markdown. A first cell names one tag or several, each in backticks;
            `…_min` after `ntk/eigenvalue_max` stands for `ntk/eigenvalue_min`.

    Returns:
        Tag -> its row.

    Example:
        >>> table = "| tag | formula | range | what |\n|---|---|---|---|\n"
        >>> rows = meanings(table + "| `a/x_max`, `…_min` | Σ λ | ≥ 0 | speed |")
        >>> list(rows), rows["a/x_min"].reading
        (['a/x_max', 'a/x_min'], 'speed')
    """
    found: dict[str, Meaning] = {}
    inside = False
    for line in text.splitlines():
        cells = [c.strip() for c in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
        if not cells:
            inside = False
        elif cells[0] == "tag":
            inside = True
        elif inside and len(cells) == 4:
            rest = (cell.replace("\\|", "|") for cell in cells[1:])
            meaning = Meaning(*rest)
            found |= dict.fromkeys(_tags(cells[0]), meaning)
    return found


def _tags(cell: str) -> list[str]:
    tags: list[str] = []
    for name in re.findall(r"`([^`]+)`", cell):
        if name.startswith("…"):
            tags.append(tags[-1].rsplit(name[1:2], 1)[0] + name[1:])
        else:
            tags.append(name)
    return tags


def meaning_of(tag: str, table: dict[str, Meaning]) -> Meaning:
    """The row of a tag; for a monitor of another name, that of the usual name.

    Args:
        tag: Such as `ntk/trace`, or `ntk_test/trace` of a second monitor.
        table: What `meanings` returns.

    Returns:
        The row, an empty one if the table has none.
    """
    if tag in table:
        return table[tag]
    group, _, rest = tag.rpartition("/")
    for known, meaning in table.items():
        usual, _, name = known.rpartition("/")
        if (
            name == rest
            and group.startswith(usual)
            and group[len(usual) :][:1] in "_./-"
        ):
            return meaning
    return Meaning()


def unit(tag: str) -> str:
    """Unit of a quantity: most are ratios or sums of squares of pure numbers."""
    name = tag.rpartition("/")[2]
    return next((u for key, u in _UNITS.items() if name.startswith(key)), "no unit")

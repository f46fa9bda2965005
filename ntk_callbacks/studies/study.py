"""What a study is: jobs that can be run one by one, and what is found in them all."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result: TypeAlias = dict[str, Any]
"""Numbers, texts and (nested) lists of them, ready for JSON."""

Results: TypeAlias = Mapping[str, Result]
"""Name of a job -> its parameters and what it returned."""


@dataclass(frozen=True)
class Findings:
    """What the results of all jobs say.

    Args:
        table: Rows, each column -> cell; every row has the same columns.
        numbers: Name -> number; those that the configuration checks, and more.
    """

    table: list[dict[str, float | str]]
    numbers: dict[str, float]


class Study(Protocol):
    """One experiment: parameters in, jobs, findings and a figure out.

    A study is a frozen dataclass of its parameters. It prints nothing and writes
    nothing: `run_study` keeps results, so that an interrupted study goes on.
    """

    def jobs(self) -> dict[str, dict[str, Any]]:
        """Name of each job -> the keywords that `run` takes, ready for JSON.

        Names are of letters, digits and any of `_ . = , -`.
        """

    @staticmethod
    def run(**parameters: Any) -> Result:
        """One job, from its parameters and the generators of torch alone.

        Generators are seeded by the name of the job before it, whatever ran earlier. A
        keyword `device` is added: where to compute.
        """

    def findings(self, results: Results) -> Findings:
        """The table and the numbers, from the parameters and results of every job."""

    def draw(self, results: Results, figure: "Figure") -> None:
        """The figure of the experiment, axes labeled with units."""

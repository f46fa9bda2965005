"""`double_descent`: the test error peaks where parameters just suffice to interpolate.

Fits of least norm to n noisy examples by p parameters. At p = n the least eigenvalue of
the kernel is almost zero, noise is divided by it, and the test error peaks; beyond, it
falls again. Shown for three models:

- linear regression on n normal inputs, noise σ² and |β| = 1, whose mean error |β̂ − β|²
  is σ² p/(n − p − 1) for p < n − 1, and 1 − n/p + σ² n/(p − n − 1) for p > n + 1; the
  logarithm of the condition number of X at p = n exceeds log n by 1.537 (n → ∞);
- random ReLU features of digits with wrong labels;
- the tangent kernel of a small two-layer network, which is where lazy training ends. At
  this size the network itself is not lazy and stops before: its error has no such peak.

Where |p − n| ≤ 2 the linear error has no variance or no mean: it is drawn, not checked.

References:
    Belkin, Hsu, Ma, Mandal 2019, arXiv:1812.11118; Hastie, Montanari, Rosset,
    Tibshirani 2022, arXiv:1903.08560; Edelman 1988, "Eigenvalues and condition numbers
    of random matrices".
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from ntk_callbacks.studies.least_norm import isotropic, random_features, small_network
from ntk_callbacks.studies.study import Findings, Result, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NEAR = 2  # parameters from the threshold where the exact error is not to be averaged
_LABELS = {
    "linear": "linear regression",
    "features": "random features",
    "network": "tangent kernel",
}


@dataclass(frozen=True)
class DoubleDescent:
    """Test errors and spectra against the number of parameters.

    Args:
        linear_parameters: p of linear regression; `linear_examples` among them.
        features: p of random features; `examples` among them.
        widths: Hidden units of the networks.
        linear_examples: n of linear regression.
        linear_draws: Training sets for each p.
        noise: σ² of linear regression.
        examples: n, digits to train on.
        inputs: Entries of an input of the networks, (inputs + 1) parameters per unit.
        draws: Random features, or networks, for each p.
        flipped: Share of training labels that are wrong.
        steps: Of gradient descent, of the networks.
    """

    linear_parameters: list[int]
    features: list[int]
    widths: list[int]
    linear_examples: int = 60
    linear_draws: int = 1000
    noise: float = 0.25
    examples: int = 200
    inputs: int = 19
    draws: int = 10
    flipped: float = 0.1
    steps: int = 500

    def jobs(self) -> dict[str, dict[str, Any]]:
        """All draws of one model and size each."""
        linear = {
            "examples": self.linear_examples,
            "draws": self.linear_draws,
            "noise": self.noise,
        }
        digits = {
            "examples": self.examples,
            "draws": self.draws,
            "flipped": self.flipped,
        }
        network = {**digits, "inputs": self.inputs, "steps": self.steps}
        per_unit = self.inputs + 1
        jobs = [
            *(("linear", p, p, linear) for p in self.linear_parameters),
            *(("features", p, p, digits) for p in self.features),
            *(("network", width, width * per_unit, network) for width in self.widths),
        ]
        return {
            f"{kind},parameters={p}": {"kind": kind, "size": size, "p": p, **settings}
            for kind, size, p, settings in jobs
        }

    @staticmethod
    def run(*, kind: str, size: int, p: int, device: str, **settings: Any) -> Result:
        """Test errors, and spectra of the kernel, draw by draw."""
        del p  # in the results for the findings
        models: dict[str, Callable[..., Result]] = {
            "linear": isotropic,
            "features": random_features,
            "network": small_network,
        }
        return models[kind](size, device=device, **settings)

    def _exact(self, p: int) -> float:
        """Mean error of linear regression; NaN where it has none."""
        n = self.linear_examples
        if p < n - 1:
            return self.noise * p / (n - p - 1)
        if p > n + 1:
            return 1 - n / p + self.noise * n / (p - n - 1)
        return math.nan

    def _curve(self, results: Results, kind: str, name: str) -> dict[int, float]:
        """Means (errors of linear regression) or medians over draws, by p in order."""
        average = fmean if (kind, name) == ("linear", "errors") else median
        found = {
            r["p"]: average(r[name]) for r in results.values() if r["kind"] == kind
        }
        return dict(sorted(found.items()))

    def findings(self, results: Results) -> Findings:
        """Errors beside exact ones; where each peaks, and how high."""
        table: list[dict[str, float | str]] = []
        numbers = {}
        for kind in _LABELS:
            n = self.linear_examples if kind == "linear" else self.examples
            errors = self._curve(results, kind, "errors")
            smallest = self._curve(results, kind, "smallest")
            conditions = self._curve(results, kind, "conditions")
            trained = self._curve(results, kind, "trained") if kind == "network" else {}
            table += [
                {
                    "model": kind,
                    "parameters": p,
                    "test_error": errors[p],
                    "exact": self._exact(p) if kind == "linear" else math.nan,
                    "trained": trained.get(p, math.nan),
                    "eigenvalue_min": smallest[p],
                    "condition_number": conditions[p],
                }
                for p in errors
            ]
            numbers[f"{kind}_peak"] = max(errors, key=errors.__getitem__) / n
            dip = min(smallest, key=smallest.__getitem__)
            numbers[f"{kind}_eigenvalue_dip"] = dip / n
            at, beyond = errors.get(n, math.nan), errors.get(5 * n, math.nan)
            numbers[f"{kind}_height"] = at / beyond
            if kind == "linear":
                numbers["linear_worst_error"] = max(
                    (
                        abs(error / self._exact(p) - 1)
                        for p, error in errors.items()
                        if abs(p - n) > _NEAR
                    ),
                    default=math.nan,
                )
                numbers["log_condition_number"] = self._excess(results)
        return Findings(table, numbers)

    def _excess(self, results: Results) -> float:
        """Mean logarithm of the condition number of X at p = n, less log n."""
        n = self.linear_examples
        logs = [
            math.log(condition) / 2 - math.log(n)
            for r in results.values()
            if r["kind"] == "linear" and r["p"] == n
            for condition in r["conditions"]
        ]
        return fmean(logs) if logs else math.nan

    def draw(self, results: Results, figure: "Figure") -> None:
        """Errors of linear regression, errors on digits, and spectra, against p/n."""
        first, second, third = figure.subplots(1, 3)
        self._draw_linear(results, first)
        self._draw_digits(results, second)
        self._draw_spectra(results, third)
        for axes in (first, second, third):
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.axvline(1.0, color="0.7", linewidth=1, zorder=0)
            axes.set_xlabel("parameters per example")
            low, high = axes.get_ylim()
            axes.set_ylim(low, high * (high / low) ** 0.25)  # room for the legend
            axes.legend(fontsize="x-small", loc="upper center", framealpha=1)

    def _draw_linear(self, results: Results, axes: "Axes") -> None:
        n = self.linear_examples
        errors = self._curve(results, "linear", "errors")
        axes.plot([p / n for p in errors], [*errors.values()], "o", label="mean")
        for some in (
            range(min(errors), n - 1),
            range(n + 2, max(*errors, n + 2) + 1),
        ):
            label = "exact" if some.start > n else None
            exact = [self._exact(p) for p in some]
            axes.plot([p / n for p in some], exact, "--", color="C0", label=label)
        axes.set_title(f"linear regression, n = {n}", fontsize="medium")
        axes.set_ylabel("mean squared error of the coefficients")

    def _draw_digits(self, results: Results, axes: "Axes") -> None:
        steps = f"the network, {self.steps} steps"
        for kind, name, style, color, label in (
            ("features", "errors", "o-", "C1", _LABELS["features"]),
            ("network", "errors", "o-", "C2", _LABELS["network"]),
            ("network", "trained", "s:", "C2", steps),
        ):
            curve = self._curve(results, kind, name)
            ratios = [p / self.examples for p in curve]
            axes.plot(
                ratios, [*curve.values()], style, color=color, label=label, markersize=4
            )
        axes.set_title(f"digits, n = {self.examples}", fontsize="medium")
        axes.set_ylabel("median squared error on test digits")

    def _draw_spectra(self, results: Results, axes: "Axes") -> None:
        for number, kind in enumerate(_LABELS):
            n = self.linear_examples if kind == "linear" else self.examples
            for name, style in (("conditions", "o-"), ("smallest", "o:")):
                curve = self._curve(results, kind, name)
                axes.plot(
                    [p / n for p in curve],
                    [*curve.values()],
                    style,
                    color=f"C{number}",
                    label=_LABELS[kind] if name == "conditions" else None,
                    markersize=3,
                )
        axes.set_title("spectra of the kernels", fontsize="medium")
        axes.set_ylabel("median of λ_max/λ_min (solid), λ_min (dotted)")

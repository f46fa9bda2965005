"""TensorBoard's Custom Scalars page: related curves of a run in common charts."""

import re
from collections.abc import Iterable
from typing import TypeAlias

Layout: TypeAlias = dict[str, dict[str, tuple[str, list[str]]]]
"""Category -> chart -> ("Multiline", patterns), as `add_custom_scalars` takes it."""

CHARTS: dict[str, dict[str, list[str]]] = {
    "spectrum": {
        "eigenvalues of the kernel": ["ntk/eigenvalue_(max|min)"],
        "trace of the kernel": ["ntk/trace(_error)?"],
        "condition number": ["ntk/condition_number"],
        "effective rank": ["ntk/(participation_ratio|entropy_rank)"],
        "largest stable learning rate": ["ntk/max_learning_rate"],
        "sharpness and its limit": ["ntk/sharpness(_limit)?"],
    },
    "drift": {
        "change since the start": [
            "ntk/((relative|scale|shape)_change|drift_noise_floor)",
            "params/displacement",
        ],
        "change of the kernel's shape": ["ntk/kernel_distance"],
        "velocity of the kernel": ["ntk/kernel_velocity"],
        "alignment of the kernel": [
            "ntk/(target_alignment|off_diagonal_share|subspace_overlap)"
        ],
        "way of the weights": ["params/(displacement|path_length)"],
        "direction of the weights": ["params/cosine_to_init"],
    },
    "isometry": {
        "singular values of ∂f/∂x": ["jacobian/(step_)?singular_value_(max|min)"],
        "mean square": ["jacobian/(step_)?mean_square"],
        "spread": ["jacobian/(log_std|(step_)?isometry_gap)"],
        "condition number of ∂f/∂x": ["jacobian/condition_number"],
    },
    "prediction": {
        "change of the loss in a step": ["prediction/loss_change_[a-z_]+"],
        "share explained": ["prediction/(explained|output_cosine)"],
        "errors": ["prediction/(output|step)_error"],
        "loss of the probe": ["prediction/loss"],
    },
    "signals": {
        "mean square q": ["signal/q_(first|last)"],
        "correlation c": ["signal/c_(first|last)"],
        "growth of gradients χ": ["signal/chi"],
        "depth scales ξ": ["signal/xi_[a-z_]+"],
        "off mean-field theory": ["signal/[qc]_mean_field_error"],
    },
    "linearization": {
        "distance of the outputs": ["linear/(twin_)?output_distance"],
        "loss": ["linear/(loss|loss_gap|twin_loss)"],
        "agreement of the classes": ["linear/(twin_)?agreement"],
        "accuracy": ["linear/[a-z_]*accuracy"],
    },
    "features": {
        "change since the start": ["features/(relative_change|cka_to_init)"],
        "alignment with the targets": ["features/target_alignment"],
        "effective rank of the features": [
            "features/(participation_ratio|entropy_rank)"
        ],
        "gates that flipped": ["features/pattern_change(_recent)?"],
        "dead units": ["features/dead_units"],
    },
    "cost": {
        "seconds of a measurement": ["monitor/seconds.*"],
        "error of the audit": ["monitor/audit_error.*"],
    },
}
"""Category -> chart -> tags; what follows the first / is a regular expression."""


def scalar_layout(groups: Iterable[str]) -> Layout:
    """The charts for which a run has curves.

    A monitor whose name begins with the usual one, such as `ntk_test`, is drawn in the
    same charts. So the charts of two runs are equal or for different monitors, and
    TensorBoard, which merges the layouts of all runs it shows, repeats none.

    Args:
        groups: Names of the monitors of a run.

    Returns:
        What `SummaryWriter.add_custom_scalars` takes.

    Example:
        >>> list(scalar_layout(["jacobian"]))
        ['isometry', 'cost']
        >>> scalar_layout(["params"])["drift"]["direction of the weights"]
        ('Multiline', ['^params([_./-][^/]+)?/(cosine_to_init)$'])
    """
    names = [*groups]
    usual = {tag.partition("/")[0] for chart in _charts() for tag in chart}
    known = {g for g in usual if any(re.match(_group(g) + "$", n) for n in names)}
    layout: Layout = {}
    for category, charts in CHARTS.items():
        for title, tags in charts.items():
            found = {tag.partition("/")[0] for tag in tags}
            if found & (known | {"monitor"}):
                patterns = [_pattern(tag) for tag in tags]
                layout.setdefault(category, {})[title] = ("Multiline", patterns)
    return layout


def _charts() -> list[list[str]]:
    return [tags for charts in CHARTS.values() for tags in charts.values()]


def _group(usual: str) -> str:
    return f"{re.escape(usual)}([_./-][^/]+)?"


def _pattern(tag: str) -> str:
    usual, _, names = tag.partition("/")
    return f"^{_group(usual)}/({names})$"

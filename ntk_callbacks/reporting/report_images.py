"""The pictures of a report: kept kernels, and spectra over the steps of each run."""

from base64 import b64encode
from collections.abc import Mapping
from html import escape

import torch
from torch import Tensor

from ntk_callbacks.reporting.density import spectral_densities
from ntk_callbacks.reporting.history import RunHistory
from ntk_callbacks.reporting.images import finite_limits, heat_map, png
from ntk_callbacks.reporting.over_time import LOGARITHMS, density_image


def kernel_figures(tag: str, runs: Mapping[str, RunHistory]) -> str:
    """The first and the last kept matrix of every run, in the same colors.

    Args:
        tag: Of a matrix.
        runs: Name -> history.

    Returns:
        HTML, empty where no run kept the matrix.
    """
    found = []
    for name, run in runs.items():
        if tag not in run.matrices:
            continue
        series = run[tag]
        shown = dict.fromkeys((0, len(series.steps) - 1))
        matrices = [torch.as_tensor(series.values[which]).double() for which in shown]
        entries = torch.cat([matrix.flatten() for matrix in matrices])
        low, high = finite_limits(entries)
        for which, matrix in zip(shown, matrices, strict=True):
            where = f"{name}, step {series.steps[which]}"
            image = heat_map(matrix, limits=(low, high))
            about = f"From {low:.3g}, dark, to {high:.3g}, yellow"
            about += "" if matrix.isfinite().all() else "; gray: undefined"
            found.append(_picture(f"{tag}: {where}", about, image, "pixels"))
    return "".join(found)


def spectrum_figures(tag: str, runs: Mapping[str, RunHistory]) -> str:
    """How a spectrum moves over the steps, one picture for each run.

    Args:
        tag: Of a vector of logarithms.
        runs: Name -> history.

    Returns:
        HTML, empty where there are fewer than two steps or the vector is no spectrum.
    """
    found = []
    for name, run in runs.items():
        if not (tag.endswith(LOGARITHMS) and tag in run.vectors):
            continue
        series = run[tag]
        if len(series.steps) < 2:
            continue
        try:
            density = spectral_densities([*map(int, series.steps)], series.values)
        except ValueError:  # no finite value
            continue
        about = "Across: completed optimizer updates; upward: values, logarithmic"
        title = f"{tag} over the steps: {name}"
        found.append(_picture(title, about, density_image(density), "wider"))
    return "".join(found)


def _picture(title: str, about: str, image: Tensor, kind: str) -> str:
    data = b64encode(png(image)).decode("ascii")
    return (
        f'<figure class="{kind}"><h3>{escape(title)}</h3>'
        f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(about)}.</figcaption></figure>"
    )

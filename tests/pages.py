"""Two runs to make the page of a report of, and the figures on it."""

import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from ntk_callbacks import load_history
from ntk_callbacks.record import Measurement
from ntk_callbacks.reporting.history_file import FOLDER, HistoryFile

STEPS = [0, 5, 10, 20]

CURVES = {
    "ntk/trace": [8.0, 6.5, 9.25, 12.0],
    "ntk/condition_number": [3.0, 40.0, math.inf, 9000.0],
    "ntk/kernel_velocity": [math.nan, 0.5, 0.25, 0.125],
    "params/displacement": [0.0, 1e-6, 2e-6, 4e-6],
    "params_tensors/displacement/net.0.weight": [0.0, 0.1, 0.2, 0.3],
    "jacobian/log_std": [0.75, 0.75, 0.75, 0.75],
    "monitor/seconds": [0.1, 0.2, 0.1, 0.1],
    "mine/number": [-3.0, 2.0, -1.0, 5.0],
}


def history(folder, curves=CURVES, digest="a" * 64, scale=1.0):
    files = {}
    after = -1
    for i, step in enumerate(STEPS):
        for name in {tag.split("/")[0].split("_")[0] for tag in curves}:
            file = files.setdefault(name, HistoryFile(Path(folder, FOLDER), name))
            file.conventions = {"probe_digest": digest, "outputs": "full"}
            scalars = {
                tag: values[i] * scale
                for tag, values in curves.items()
                if tag.split("/")[0].split("_")[0] == name
            }
            vectors = {}
            if name == "ntk":
                vectors["ntk/eigenvalues_log10"] = torch.tensor([0.0, 2.0, 1.0]) + i
            file.append(Measurement(step, scalars, vectors), after)
        after = step
    return load_history(folder)


@pytest.fixture
def runs(tmp_path):
    return {
        "narrow": history(tmp_path / "a"),
        "wide": history(tmp_path / "b", scale=2.0),
    }


def figures(page):
    """Tag -> (its SVG, its caption)."""
    pattern = r"<figure><h3>([^<]*)</h3>(<svg.*?</svg>)<figcaption>(.*?)</figcaption>"
    found = re.findall(pattern, page)
    assert len({tag for tag, _, _ in found}) == len(found)
    return {tag: (ElementTree.fromstring(svg), text) for tag, svg, text in found}


def texts(svg):
    return [element.text for element in svg.iter("text")]

"""The pictures of a report: kernels and spectra of each run, in the same colors."""

import re
from base64 import b64decode
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ntk_callbacks import load_history
from ntk_callbacks.record import Measurement
from ntk_callbacks.reporting.history_file import FOLDER, HistoryFile
from ntk_callbacks.reporting.report_page import report_page


def pictures(page):
    """Title -> pixels (height, width, 3) of every embedded image."""
    found = re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,([^"]*)"', page)
    return {
        title: np.asarray(Image.open(BytesIO(b64decode(data))).convert("RGB"))
        for title, data in found
    }


def kept(folder, matrices):
    file = HistoryFile(Path(folder, FOLDER), "ntk", matrices=True)
    file.conventions = {"outputs": "full"}
    after = -1
    for step, matrix in matrices.items():
        vectors = {"ntk/eigenvalues_log10": torch.tensor([0.0, 1.0]) + step}
        found = {"ntk/kernel": torch.tensor(matrix)}
        file.append(Measurement(step, {"ntk/trace": 1.0}, vectors, found), after)
        after = step
    return load_history(folder)


def test_first_and_last_kernel_of_each_run_in_the_same_colors(tmp_path):
    steps = {0: [[1.0, 0.0], [0.0, 1.0]], 3: [[9.0, 9.0]] * 2, 7: [[2.0, 1.0]] * 2}
    runs = {
        "a<b": kept(tmp_path / "a", steps),
        "one": kept(tmp_path / "b", {0: [[5.0]]}),
    }
    found = pictures(report_page(runs))
    kernels = {title: image for title, image in found.items() if "kernel" in title}
    assert [*kernels] == [
        "ntk/kernel: a&lt;b, step 0",
        "ntk/kernel: a&lt;b, step 7",
        "ntk/kernel: one, step 0",
    ]
    first, last, _ = kernels.values()
    dark, yellow = (68, 1, 84), (253, 231, 37)
    side = first.shape[0] // 2
    assert tuple(first[0, side]) == dark  # 0, the smallest of both
    assert tuple(last[0, 0]) == yellow  # 2, the largest
    assert tuple(first[0, 0]) == tuple(last[0, side])  # 1 in both
    assert tuple(first[0, 0]) not in (dark, yellow)


def test_spectra_over_the_steps_of_each_run(tmp_path):
    steps = {step: [[1.0]] for step in (0, 3, 7)}
    runs = {"a": kept(tmp_path / "a", steps), "one": kept(tmp_path / "b", {0: [[5.0]]})}
    page = report_page(runs)
    assert "ntk/eigenvalues_log10 over the steps: a" in pictures(page)
    assert "over the steps: one" not in page  # a single step is no course

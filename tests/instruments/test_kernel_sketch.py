"""The error of a trace from a few products, against the errors that are made."""

import pytest
import torch

from ntk_callbacks.engine.matrix_free import Eigenpairs, random_signs
from ntk_callbacks.instruments.kernel_sketch import SKETCH_METRICS, KernelSketch

M = 60


def sketch_of(kernel, count, generator):
    signs = random_signs((len(kernel), count), generator).double()
    images = kernel @ signs
    nothing = torch.zeros(0, dtype=torch.float64)
    largest = Eigenpairs(nothing, images[:, :0], nothing, True)
    return KernelSketch(images, signs, largest, images, None, 0)


@pytest.mark.parametrize("count", [2, 16])
@pytest.mark.parametrize(
    ("values", "within_two"),
    [
        (torch.linspace(1, 2, M), 0.93),
        (torch.exp(-torch.arange(M) / 3.0), 0.88),
        (torch.arange(1, M + 1) ** -1.5, 0.85),  # traces are nearly of one mode
    ],
    ids=["flat", "exponential", "power"],
)
def test_trace_lies_within_two_errors(values, within_two, count):
    """Of two vectors too: by their spread alone it lies there in 60 to 70 of 100."""
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(M, M, generator=generator).double()).Q
    kernel = (basis * values) @ basis.mT
    missed, bars = [], []
    for _ in range(1000):
        sketch = sketch_of(kernel, count, generator)
        missed.append(SKETCH_METRICS["trace"](sketch) - values.double().sum())
        bars.append(SKETCH_METRICS["trace_error"](sketch))
    missed, bars = torch.stack(missed), torch.stack(bars)
    assert (missed.abs() <= 2 * bars).double().mean() >= within_two
    off_diagonal = kernel.square().sum() - kernel.diagonal().square().sum()
    expected = (2 * off_diagonal / count).sqrt().item()
    assert bars.square().mean().sqrt().item() == pytest.approx(expected, rel=0.1)


def test_trace_of_equal_examples_that_share_nothing_has_no_error():
    kernel = 3 * torch.eye(M, dtype=torch.float64)
    sketch = sketch_of(kernel, 2, torch.Generator().manual_seed(0))
    assert SKETCH_METRICS["trace"](sketch).item() == pytest.approx(3 * M)
    assert SKETCH_METRICS["trace_error"](sketch).item() == pytest.approx(0, abs=1e-6)

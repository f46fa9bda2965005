"""Scale-free metrics of float32 kernels so large or small that squares overflow.

The oracle is the same metric of the same numbers, times an exact power of two, in
float64, where nothing overflows.
"""

import pytest
import torch

from ntk_callbacks.metrics import (
    cka,
    entropy_rank,
    isometry_gap,
    kernel_distance,
    off_diagonal_share,
    participation_ratio,
    relative_change,
    scale_change,
    shape_change,
    target_alignment,
)

CLASSES = torch.tensor([0, 1, 0, 2, 1])
PAIRS = [cka, kernel_distance, relative_change, scale_change, shape_change]
ALONE = {
    "target_alignment": lambda kernel: target_alignment(kernel, CLASSES),
    "entropy_rank": lambda kernel: entropy_rank(kernel.diagonal()),
    "participation_ratio": lambda kernel: participation_ratio(kernel.diagonal()),
    "isometry_gap": lambda kernel: isometry_gap(kernel.diagonal().abs()),
    "off_diagonal_share": lambda kernel: off_diagonal_share(
        kernel.flatten()[:16].view(2, 2, 2, 2)
    ),
}
EXPONENTS = [-110, -85, -70, 0, 70, 85, 120]


def kernel():
    half = torch.randn(5, 7)
    return half @ half.mT


@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("metric", PAIRS, ids=lambda metric: metric.__name__)
def test_two_kernels(metric, exponent):
    first, second = kernel(), kernel()
    expected = metric(first.double(), second.double())
    found = metric(first * 2.0**exponent, second * 2.0**exponent)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("name", ALONE)
def test_one_kernel(name, exponent):
    first = kernel()
    expected = ALONE[name](first.double())
    found = ALONE[name](first * 2.0**exponent)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", ALONE)
def test_half_precision_has_room_for_squares(name):
    first = kernel().half()
    expected = ALONE[name](first.double())
    found = ALONE[name](first * 2.0**9)
    assert found.item() == pytest.approx(expected.item(), rel=2e-2)


@pytest.mark.parametrize("metric", [kernel_distance, cka])
def test_norms_beyond_float32(metric):
    ones = torch.ones(5, 5) + torch.eye(5)
    first, second = ones * 2.0**126, torch.eye(5)  # 2¹²⁷ at most, the norm above 2¹²⁸
    expected = metric(ones.double(), second.double())
    assert metric(first, second).item() == pytest.approx(expected.item(), rel=1e-5)


def test_entropy_rank_of_a_trace_beyond_float32():
    assert entropy_rank(torch.full((10,), 1e38)).item() == pytest.approx(10, rel=1e-6)


def test_couplings_below_the_precision_of_the_whole_are_seen():
    ntk = torch.eye(3).expand(4, 4, 3, 3).clone()
    assert off_diagonal_share(ntk) == 0
    ntk[..., 0, 1] = 1e-5
    assert off_diagonal_share(ntk).item() == pytest.approx(1e-10 / 3, rel=1e-5)

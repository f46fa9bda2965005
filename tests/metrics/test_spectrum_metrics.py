"""Scalars of a spectrum against hand-made spectra, and what they must not depend on."""

import math

import pytest
import torch

from ntk_callbacks.metrics import (
    condition_number,
    entropy_rank,
    isometry_gap,
    log_std,
    mean_square,
    participation_ratio,
)

ALL = [condition_number, entropy_rank, log_std, mean_square, participation_ratio]
NAMES = [metric.__name__ for metric in ALL]


def spectrum(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("metric", ALL, ids=NAMES)
def test_an_empty_spectrum_is_refused(metric):
    with pytest.raises(ValueError, match="at least one value"):
        metric(torch.zeros(0))


@pytest.mark.parametrize("metric", ALL, ids=NAMES)
def test_nan_in_nan_out(metric):
    assert metric(spectrum(1, torch.nan, 2)).isnan()
    assert metric(spectrum(torch.nan)).isnan()


@pytest.mark.parametrize("metric", ALL, ids=NAMES)
def test_order_does_not_matter(metric):
    values = torch.rand(20, dtype=torch.float64) + 0.1
    assert metric(values.flip(0)).item() == pytest.approx(metric(values).item())


@pytest.mark.parametrize("metric", [m for m in ALL if m is not mean_square])
def test_scale_does_not_matter(metric):
    values = torch.rand(20, dtype=torch.float64) + 0.1
    assert metric(7 * values).item() == pytest.approx(metric(values).item(), rel=1e-12)


@pytest.mark.parametrize("metric", ALL, ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_result_has_no_axes_and_the_dtype_given(metric, dtype):
    value = metric(torch.ones(3, dtype=dtype))
    assert value.shape == ()
    assert value.dtype == dtype


def test_condition_number():
    assert condition_number(spectrum(1, 8, 2)) == 8
    assert condition_number(spectrum(3)) == 1
    assert condition_number(spectrum(3, 3)) == 1


def test_condition_number_of_singular_kernels_is_infinite():
    assert condition_number(spectrum(1, 0)) == math.inf
    assert condition_number(spectrum(1, -1e-9)) == math.inf  # round-off below zero
    assert condition_number(spectrum(0, 0)).isnan()


def test_condition_number_of_a_kernel_without_a_positive_value_is_none():
    assert condition_number(spectrum(-1, -4)).isnan()
    assert condition_number(spectrum(0, -1e-9)).isnan()
    assert condition_number(spectrum(-1, -4), tolerance=1e-7).isnan()


def test_condition_number_counts_values_below_the_tolerance_as_zero():
    values = spectrum(1, 1e-8)
    assert condition_number(values).item() == pytest.approx(1e8)
    assert condition_number(values, tolerance=1e-7) == math.inf
    assert condition_number(values, tolerance=1e-9).item() == pytest.approx(1e8)
    assert condition_number(spectrum(1, 0.5), tolerance=0.5) == math.inf  # "up to"


@pytest.mark.parametrize("rank", [participation_ratio, entropy_rank])
def test_ranks_count_equal_eigenvalues(rank):
    for r in (1, 2, 5):
        flat = torch.cat([torch.full((r,), 3.0), torch.zeros(4)]).double()
        assert rank(flat).item() == pytest.approx(r, rel=1e-14)
    assert rank(torch.zeros(3)).isnan()


def test_ranks_of_two_unequal_eigenvalues():
    values = spectrum(3, 1)
    assert participation_ratio(values).item() == pytest.approx(16 / 10, rel=1e-14)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert entropy_rank(values).item() == pytest.approx(math.exp(entropy), rel=1e-14)


def test_entropy_rank_lies_between_participation_ratio_and_count():
    for _ in range(20):
        values = torch.rand(10, dtype=torch.float64) ** 3
        assert 1 <= participation_ratio(values) <= entropy_rank(values) <= 10


def test_ranks_of_many_values_in_half_precision():
    # Their sum is beyond float16, and so are squares of sums of far fewer.
    for rank in (participation_ratio, entropy_rank):
        found = rank(torch.ones(70_000, dtype=torch.float16))
        assert found.item() == pytest.approx(70_000, rel=1e-5)


def test_entropy_rank_takes_negative_round_off_for_zero():
    assert entropy_rank(spectrum(4, 4, -1e-12)).item() == pytest.approx(2, rel=1e-14)


def test_mean_square():
    assert mean_square(spectrum(1, 2, 2)) == 3
    # ⟨s²⟩ = ‖J‖²_F / r, whatever J.
    jacobian = torch.randn(4, 6, dtype=torch.float64)
    values = torch.linalg.svdvals(jacobian)
    expected = (jacobian**2).sum() / 4
    assert mean_square(values).item() == pytest.approx(expected.item(), rel=1e-12)
    assert mean_square(values.view(2, 2)) == mean_square(values)


def test_isometry_gap_is_the_norm_of_what_is_left_of_the_gram_matrix():
    torch.manual_seed(0)
    jacobians = torch.randn(3, 4, 6, dtype=torch.float64)
    gram = jacobians @ jacobians.mT
    scale = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    expected = torch.linalg.matrix_norm(gram / scale - torch.eye(4), ord=2)
    found = isometry_gap(torch.linalg.svdvals(jacobians))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert isometry_gap(spectrum(2, 2, 2)) == 0
    assert isometry_gap(spectrum(5, 0, 0, 0)) == 3  # rank one: r − 1
    assert isometry_gap(spectrum(0, 0)).isnan()
    with pytest.raises(ValueError, match="at least one value"):
        isometry_gap(torch.zeros(2, 0))


@pytest.mark.parametrize("value", [0.3, 0.1, 7e-20, 3e19])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 24, 100, 1031])
def test_equal_values_of_float32_are_an_isometry(count, value):
    values = torch.full((count,), value)
    assert log_std(values) == 0
    assert isometry_gap(values) == 0
    assert (isometry_gap(values.expand(3, count)) == 0).all()


def test_log_std_of_nearly_equal_values_keeps_its_digits():
    expected = math.log1p(2**-20) / 2  # ln s = ± half of the ratio's
    for power in (-100, -50, 0, 50, 100):
        values = torch.tensor([1.0, 1 + 2**-20]) * 2.0**power
        assert log_std(values).item() == pytest.approx(expected, rel=1e-6)
    far = torch.tensor([1e-37, 1e37])
    assert log_std(far).item() == pytest.approx(37 * math.log(10), rel=1e-6)


def test_log_std_does_not_hide_what_is_no_number():
    assert log_std(spectrum(0, 1, torch.nan)).isnan()


def test_log_std():
    assert log_std(spectrum(2, 2, 2)) == 0
    # ln s = ±1: the population standard deviation is 1.
    assert log_std(spectrum(math.e, 1 / math.e)).item() == pytest.approx(1, rel=1e-14)
    assert log_std(spectrum(1, 0)) == math.inf
    assert log_std(spectrum(0, 0)).isnan()
    assert log_std(spectrum(0.3)) == 0

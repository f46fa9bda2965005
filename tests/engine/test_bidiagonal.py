"""Ends of spectra by products against the singular values of the matrices."""

import pytest
import torch

from ntk_callbacks.engine.bidiagonal import extreme_singular_values


def with_values(values, c, d, seed):
    """A c × d matrix of given singular values, between random rotations."""
    generator = torch.Generator().manual_seed(seed)

    def rotation(size):
        return torch.linalg.qr(torch.randn(size, size, generator=generator).double()).Q

    middle = torch.zeros(c, d, dtype=torch.float64)
    middle.diagonal().copy_(values)
    return rotation(c) @ middle @ rotation(d)


def ends(matrices, **settings):
    n, c, d = matrices.shape
    calls = {"times": 0, "transposed": 0}

    def times(v):
        calls["times"] += 1
        return (matrices @ v[..., None])[..., 0]

    def transposed(u):
        calls["transposed"] += 1
        return (matrices.mT @ u[..., None])[..., 0]

    found = extreme_singular_values(
        times, transposed, (n, c, d), like=matrices, **settings
    )
    return found, calls


@pytest.mark.parametrize(("c", "d"), [(7, 7), (5, 9), (9, 5), (1, 6), (6, 1)])
def test_as_many_steps_as_values_are_exact(c, d):
    torch.manual_seed(0)
    matrices = torch.randn(3, c, d).double()
    found, _ = ends(matrices)
    s = torch.linalg.svdvals(matrices)
    torch.testing.assert_close(found.largest, s[:, 0], rtol=1e-12, atol=0)
    torch.testing.assert_close(found.smallest, s[:, -1], rtol=1e-10, atol=0)
    assert found.largest_converged.all()
    assert found.smallest_converged.all()


@pytest.mark.parametrize(("c", "d"), [(300, 300), (300, 500), (500, 300)])
def test_both_ends_of_a_well_conditioned_matrix(c, d):
    values = torch.linspace(0.8, 1.2, 298).double()
    values = torch.cat([torch.tensor([0.5]), values, torch.tensor([2.0])])
    matrices = torch.stack([with_values(values, c, d, seed) for seed in (0, 1)])
    found, calls = ends(matrices)
    assert found.largest_converged.all()
    assert found.smallest_converged.all()
    # The error is of second order in the tolerance of 1e-3.
    assert (found.largest - 2).abs().max() < 1e-5
    assert (found.smallest - 0.5).abs().max() < 1e-5
    assert max(calls.values()) <= 33  # far from 300


def test_wide_gaps_of_scale_between_examples_do_not_matter():
    values = torch.linspace(1, 2, 100).double()
    one = with_values(values, 100, 100, 0)
    scales = torch.tensor([1e-12, 1.0, 1e12], dtype=torch.float64)
    found, _ = ends(scales[:, None, None] * one)
    torch.testing.assert_close(
        found.largest / scales, torch.full((3,), 2.0).double(), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(
        found.smallest / scales, torch.ones(3).double(), rtol=1e-3, atol=0
    )


def test_an_isometry_takes_one_step():
    matrices = 3 * with_values(torch.ones(200).double(), 200, 250, 0)[None]
    found, calls = ends(matrices)
    torch.testing.assert_close(found.largest, torch.tensor([3.0]).double())
    torch.testing.assert_close(found.smallest, torch.tensor([3.0]).double())
    assert calls == {"times": 1, "transposed": 1}


def test_examples_that_end_early_wait_for_the_others():
    values = torch.linspace(1, 2, 60).double()
    matrices = torch.stack(
        [
            2 * with_values(torch.ones(60).double(), 60, 60, 0),
            with_values(values, 60, 60, 1),
            torch.zeros(60, 60).double(),
        ]
    )
    found, _ = ends(matrices)
    expected = torch.tensor([[2.0, 2.0, 0.0], [2.0, 1.0, 0.0]]).double()
    torch.testing.assert_close(found.largest, expected[0], rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(found.smallest, expected[1], rtol=1e-4, atol=1e-12)
    assert found.smallest_converged.all()


def test_a_singular_matrix_has_a_smallest_value_of_zero():
    values = torch.cat([torch.zeros(3), torch.linspace(1, 2, 37)]).double()
    for c, d in ((40, 40), (40, 50), (50, 40)):
        found, _ = ends(with_values(values, c, d, 0)[None])
        assert found.smallest.abs().max() < 1e-12
        assert (found.largest - 2).abs().max() < 1e-5


def test_a_spectrum_dense_near_zero_is_not_believed():
    torch.manual_seed(0)
    matrices = torch.randn(2, 160, 160).double() / 160**0.5
    found, _ = ends(matrices, max_steps=50)
    s = torch.linalg.svdvals(matrices)
    assert found.largest_converged.all()
    assert not found.smallest_converged.any()
    assert (found.smallest >= s[:, -1]).all()  # from within
    assert (found.largest <= s[:, 0] * (1 + 1e-12)).all()
    torch.testing.assert_close(found.largest, s[:, 0], rtol=1e-5, atol=0)
    more, _ = ends(matrices, max_steps=160)
    torch.testing.assert_close(more.smallest, s[:, -1], rtol=1e-6, atol=0)
    assert more.smallest_converged.all()


@pytest.mark.parametrize(("c", "d", "steps"), [(160, 160, 24), (60, 60, 60)])
def test_products_end_where_only_a_hopeless_smallest_value_is_missing(c, d, steps):
    torch.manual_seed(0)
    matrix, used = torch.randn(1, c, d).double(), []

    def times(v):
        used.append(v)
        return v @ matrix[0].mT

    found = extreme_singular_values(times, lambda u: u @ matrix[0], (1, c, d))
    s = torch.linalg.svdvals(matrix)
    assert len(used) == steps  # all where that makes the smallest value exact
    assert found.largest_converged.all()
    assert found.smallest_converged.all() == (steps == c)
    torch.testing.assert_close(found.largest, s[:, 0], rtol=1e-6, atol=0)


def test_single_precision():
    values = torch.linspace(1, 2, 300)
    found, _ = ends(with_values(values.double(), 300, 300, 0).float()[None])
    assert found.largest.dtype == torch.float64
    assert (found.largest - 2).abs().max() < 1e-4
    assert (found.smallest - 1).abs().max() < 1e-4


def test_what_is_not_finite_is_nan_and_spoils_nothing_else():
    one = with_values(torch.linspace(1, 2, 30).double(), 30, 30, 0)
    bad = one.clone()
    bad[3, 4] = torch.inf
    found, _ = ends(torch.stack([bad, one]))
    assert found.largest.isnan().tolist() == [True, False]
    assert found.largest_converged.tolist() == [False, True]
    assert (found.smallest[1] - 1).abs() < 1e-4


def test_arguments_are_checked():
    one = torch.eye(3).double()[None]
    with pytest.raises(ValueError, match="shape"):
        ends(one[:, :0])
    with pytest.raises(ValueError, match="tolerance=0"):
        ends(one, tolerance=0.0)
    with pytest.raises(ValueError, match="max_steps=0"):
        ends(one, max_steps=0)


SPREAD = {
    "a_few_large": [1e4, 5e3, 1e3, *torch.linspace(2, 1, 197).tolist()],
    "over_six_decades": torch.logspace(0, -6, 200).tolist(),
    "over_twelve_decades": torch.logspace(0, -12, 200).tolist(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_steps", [64, 200])
@pytest.mark.parametrize("spectrum", SPREAD)
def test_spectra_that_lose_orthogonality(spectrum, max_steps, dtype):
    """What one pass of orthogonalization leaves grows to NaN, or to 1e70, on these."""
    values = torch.tensor(SPREAD[spectrum], dtype=torch.float64)
    matrices = torch.stack([with_values(values, 200, 200, seed) for seed in (0, 1)])
    found, _ = ends(matrices.to(dtype), max_steps=max_steps)
    assert found.largest_converged.all()
    bound = 20 * torch.finfo(dtype).eps
    assert (found.largest / values[0] - 1).abs().max() < bound
    # Besides round-off: of second order in the tolerance of 1e-3.
    off = (found.smallest - values[-1]).abs()[found.smallest_converged]
    assert off.lt(bound * values[0] + 1e-5 * values[-1]).all()

"""Alignments: what they are on kernels made for it, and what they are blind to."""

import inspect

import pytest
import torch

from ntk_callbacks.metrics import (
    cka,
    class_blocks,
    off_diagonal_share,
    target_alignment,
    within_between_ratio,
)


def positive(n=6):
    half = torch.randn(n, n, dtype=torch.float64)
    return half @ half.mT


def centering(n):
    return torch.eye(n, dtype=torch.float64) - 1 / n


def test_cka_is_the_cosine_of_centered_kernels():
    k, m, h = positive(), positive(), centering(6)
    first, second = h @ k @ h, h @ m @ h
    expected = torch.trace(first @ second) / (first.norm() * second.norm())
    assert cka(k, m).item() == pytest.approx(expected.item(), rel=1e-12)


def test_cka_of_a_kernel_with_itself_is_one():
    k = positive()
    assert cka(k, 3 * k).item() == pytest.approx(1, rel=1e-14)


def test_cka_never_leaves_its_interval():
    torch.manual_seed(0)
    for _ in range(30):
        k = positive(9).float()
        assert 0.999 < cka(k, 3 * k) <= 1
        assert -1 <= cka(k, -k) < -0.999


def test_cka_is_blind_to_scale_shift_and_common_permutation():
    k, m = positive(), positive()
    value = cka(k, m).item()
    order = torch.randperm(6)
    assert cka(5 * k + 2, m - 7).item() == pytest.approx(value, rel=1e-12)
    assert cka(k[order][:, order], m[order][:, order]).item() == pytest.approx(value)
    assert cka(m, k).item() == pytest.approx(value, rel=1e-14)


def test_cka_of_orthogonal_features_is_zero():
    u = torch.tensor([1.0, 1.0, -1.0, -1.0])
    v = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert cka(torch.outer(u, u), torch.outer(v, v)) == 0


def test_cka_of_constant_kernels_is_nan():
    assert cka(torch.ones(3, 3), torch.eye(3)).isnan()
    assert cka(torch.eye(3) * torch.nan, torch.eye(3)).isnan()


@pytest.mark.parametrize("value", [0.3, 0.1, 1e-20, 7e19])
@pytest.mark.parametrize("n", [3, 7, 24, 61])
def test_cka_of_constant_float32_kernels_is_not_that_of_round_off(n, value):
    torch.manual_seed(0)
    kernel = positive(n).float()
    constant = torch.full((n, n), value)
    rows = torch.rand(n).expand(n, n)  # constant on one side
    for other in (constant, rows, rows.mT):
        assert cka(kernel, other).isnan()
    assert target_alignment(kernel, constant[0]).isnan()
    assert target_alignment(kernel, torch.rand(5).expand(n, 5)).isnan()


def test_cka_of_two_shapes():
    # Without the shape checks of this test run, as a user calls it.
    with pytest.raises(ValueError, match=r"\(2, 2\) and \(3, 3\)"):
        inspect.unwrap(cka)(torch.eye(2), torch.eye(3))


def test_target_alignment_is_cka_with_the_one_hot_gram_matrix():
    k = positive()
    classes = torch.tensor([0, 2, 1, 0, 2, 2])
    y = torch.nn.functional.one_hot(classes).double()
    assert target_alignment(k, classes).item() == pytest.approx(
        cka(k, y @ y.mT).item(), rel=1e-14
    )


def test_target_alignment_of_a_kernel_made_of_its_targets_is_one():
    y = torch.randn(6, 3, dtype=torch.float64)
    assert target_alignment(y @ y.mT, y).item() == pytest.approx(1, rel=1e-14)


def test_target_alignment_does_not_depend_on_the_names_of_classes():
    k = positive()
    classes = torch.tensor([0, 1, 1, 0, 2, 2])
    renamed = torch.tensor([9, -1, -1, 9, 100, 100])
    assert target_alignment(k, classes) == target_alignment(k, renamed)
    assert target_alignment(k, classes) == target_alignment(k, classes[:, None])


def test_target_alignment_of_two_classes_is_that_of_signs():
    k = positive()
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, -1.0])
    classes = (signs > 0).long()
    assert target_alignment(k, classes).item() == pytest.approx(
        target_alignment(k, signs).item(), rel=1e-12
    )
    assert target_alignment(k, signs > 0) == target_alignment(k, classes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_target_alignment_of_targets_with_a_large_mean(dtype):
    # Squares of 2000 leave two digits of what differs in a product of float32.
    torch.manual_seed(0)
    kernel = positive(40)
    years = (2000 + 3 * torch.randn(40, 2)).to(dtype)
    centered = years.double() - years.double().mean(0)
    expected = cka(kernel, centered @ centered.mT).item()
    found = target_alignment(kernel.to(dtype), years).item()
    assert found == pytest.approx(
        expected, rel=1e-4 if dtype == torch.float32 else 1e-10
    )


def test_target_alignment_without_examples_is_nan():
    for targets in (torch.zeros(0), torch.zeros(0, 3), torch.zeros(0).long()):
        assert target_alignment(torch.zeros(0, 0), targets).isnan()


def test_target_alignment_edges():
    assert target_alignment(positive(3), torch.zeros(3)).isnan()
    assert target_alignment(positive(3), torch.ones(3).long()).isnan()
    with pytest.raises(ValueError, match=r"shape \(2,\) for a kernel of 3 examples"):
        inspect.unwrap(target_alignment)(positive(3), torch.zeros(2))


def test_off_diagonal_share():
    identity = torch.eye(3).expand(4, 4, 3, 3)
    assert off_diagonal_share(identity) == 0
    everything = torch.ones(4, 4, 3, 3)
    assert off_diagonal_share(everything).item() == pytest.approx(6 / 9)
    assert off_diagonal_share(everything - identity) == 1
    assert off_diagonal_share(torch.randn(3, 3, 1, 1)) == 0
    assert off_diagonal_share(torch.zeros(2, 2, 2, 2)).isnan()


def test_off_diagonal_share_is_blind_to_scale():
    ntk = torch.randn(4, 4, 3, 3, dtype=torch.float64)
    share = off_diagonal_share(ntk).item()
    assert 0 < share < 1
    assert off_diagonal_share(-7 * ntk).item() == pytest.approx(share, rel=1e-13)


def test_off_diagonal_share_of_two_sets_of_examples():
    ntk = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    squares = ntk.square()
    coupling = squares[..., 0, 1].sum() + squares[..., 1, 0].sum()
    expected = (coupling / squares.sum()).item()
    assert off_diagonal_share(ntk).item() == pytest.approx(expected, rel=1e-12)


def test_class_blocks_are_means_over_pairs_of_different_examples():
    kernel, classes = positive(7), [4, 1, 4, 9, 1, 1, 4]
    blocks = class_blocks(kernel, torch.tensor(classes))
    within, between = [], []
    for row, one in enumerate([1, 4, 9]):
        for column, other in enumerate([1, 4, 9]):
            entries = [
                kernel[i, j].item()
                for i, first in enumerate(classes)
                for j, second in enumerate(classes)
                if i != j and (first, second) == (one, other)
            ]
            (within if one == other else between).extend(entries)
            if entries:
                mean = sum(entries) / len(entries)
                assert blocks[row, column].item() == pytest.approx(mean, rel=1e-12)
            else:
                assert (one, other) == (9, 9)
                assert blocks[row, column].isnan()
    ratio = (sum(within) / len(within)) / (sum(between) / len(between))
    found = within_between_ratio(kernel, torch.tensor(classes)).item()
    assert found == pytest.approx(ratio, rel=1e-12)


@pytest.mark.parametrize("function", [class_blocks, within_between_ratio])
def test_labels_in_a_column_are_the_same_labels(function):
    kernel, classes = positive(5), torch.tensor([0, 1, 1, 0, 2])
    expected, found = function(kernel, classes), function(kernel, classes[:, None])
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_class_blocks_see_past_a_large_diagonal():
    kernel = torch.full((4, 4), 0.25) + 1e8 * torch.eye(4)
    kernel.diagonal()[2:] *= 3
    blocks = class_blocks(kernel, torch.tensor([0, 1, 0, 1]))
    torch.testing.assert_close(blocks, torch.full((2, 2), 0.25), rtol=0, atol=0)


def test_a_kernel_that_does_not_know_the_classes_has_ratio_one():
    kernel = torch.full((4, 4), 2.0) + 5 * torch.eye(4)
    assert within_between_ratio(kernel, torch.tensor([0, 1, 0, 1])) == 1


@pytest.mark.parametrize("classes", [[3, 3, 3], [0, 1, 2]])
def test_no_ratio_without_pairs_of_both_kinds(classes):
    assert within_between_ratio(positive(3), torch.tensor(classes)).isnan()


@pytest.mark.parametrize("function", [class_blocks, within_between_ratio])
def test_one_class_for_each_example(function):
    with pytest.raises(ValueError, match=r"shape \(2,\) for a kernel of 3 examples"):
        function(positive(3), torch.tensor([0, 1]))

"""Angles between subspaces: rotations made by hand, laws, edges."""

import math

import pytest
import torch

from ntk_callbacks.metrics import principal_angles, subspace_overlap, top_directions


def rotated(*angles, m=8):
    """Columns e_i cos a_i + e_{k+i} sin a_i beside e_1 … e_k, both turned the same."""
    k = len(angles)
    basis = torch.zeros(m, k, dtype=torch.float64)
    for i, angle in enumerate(angles):
        basis[i, i], basis[k + i, i] = math.cos(angle), math.sin(angle)
    reference = torch.eye(m, dtype=torch.float64)[:, :k]
    turn = torch.linalg.qr(torch.randn(m, m, dtype=torch.float64))[0]
    inside = torch.linalg.qr(torch.randn(k, k, dtype=torch.float64))[0]
    return turn @ basis @ inside, turn @ reference


def test_angles_that_were_made():
    angles = [0.3, 1.2, 0.05]
    found = principal_angles(*rotated(*angles))
    assert found.tolist() == pytest.approx(sorted(angles), rel=1e-12)
    overlap = sum(math.cos(angle) ** 2 for angle in angles) / 3
    assert subspace_overlap(*rotated(*angles)).item() == pytest.approx(overlap)


def test_small_angles_keep_their_digits():
    # arccos(1 − 5e-21) would be 0.
    found = principal_angles(*rotated(1e-10))
    assert found.item() == pytest.approx(1e-10, rel=1e-5)


def test_extremes():
    axes = torch.eye(4, dtype=torch.float64)
    assert principal_angles(axes[:, :2], axes[:, :2]).tolist() == [0, 0]
    right = principal_angles(axes[:, :2], axes[:, 2:])
    assert right.tolist() == pytest.approx([math.pi / 2] * 2)
    assert subspace_overlap(axes[:, :2], axes[:, 2:]) == 0
    assert subspace_overlap(axes[:, :2], axes[:, [1, 0]]) == 1


def test_random_subspaces_overlap_by_chance():
    pairs = [
        [torch.linalg.qr(torch.randn(40, 8, dtype=torch.float64))[0] for _ in range(2)]
        for _ in range(50)
    ]
    mean = sum(subspace_overlap(*pair).item() for pair in pairs) / 50
    assert mean == pytest.approx(8 / 40, rel=0.05)  # scatter about 1 %


def test_top_directions_are_eigenvectors_of_the_largest_values():
    half = torch.randn(6, 6, dtype=torch.float64)
    matrix = half @ half.mT
    values = torch.linalg.eigvalsh(matrix).flip(0)[:3]
    found = top_directions(matrix, 3)
    assert torch.allclose(matrix @ found, found * values, atol=1e-10)
    assert torch.allclose(found.mT @ found, torch.eye(3).double(), atol=1e-12)


def test_what_is_not_finite_gives_nan():
    bad = torch.full((3, 3), torch.nan)
    assert top_directions(bad, 2).isnan().all()
    basis = torch.eye(3, dtype=torch.float64)[:, :2]
    assert principal_angles(top_directions(bad, 2), basis).isnan().all()
    assert subspace_overlap(top_directions(bad, 2), basis).isnan()


@pytest.mark.parametrize("function", [principal_angles, subspace_overlap])
def test_shapes_must_agree(function):
    with pytest.raises(ValueError, match=r"\(4, 2\).*\(4, 3\)"):
        function(torch.eye(4)[:, :2], torch.eye(4)[:, :3])


def test_as_many_directions_as_there_are():
    with pytest.raises(ValueError, match=r"k=4; expected 1 … 3"):
        top_directions(torch.eye(3), 4)
    with pytest.raises(ValueError, match="k ≤ m"):
        principal_angles(torch.eye(2, 3), torch.eye(2, 3))


def test_overlap_with_itself_is_at_most_one():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        for k in range(1, 9):
            basis = torch.linalg.qr(torch.randn(20, k, dtype=dtype)).Q
            assert 0.999 < subspace_overlap(basis, basis) <= 1

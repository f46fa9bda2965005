"""Matrices as images: the right color in the right place."""

import math

import numpy as np
import pytest
import torch

from ntk_callbacks.reporting.images import heat_map

DARK = [68, 1, 84]  # viridis at 0, 1/2 and 1, as Matplotlib has it
MIDDLE = [33, 144, 141]
YELLOW = [253, 231, 37]
GRAY = [128, 128, 128]


def colors(matrix):
    """RGB of every entry, (rows, columns, 3)."""
    return heat_map(matrix, min_side=1).permute(1, 2, 0)


def test_ends_and_middle_have_the_colors_of_viridis():
    assert colors(torch.tensor([[-3.0, 1.0, 5.0]])).tolist() == [[DARK, MIDDLE, YELLOW]]


def test_between_two_colors_the_image_interpolates():
    quarter = colors(torch.tensor([[0.0, 3 / 16, 1.0]]))[0, 1]
    assert quarter.tolist() == [  # halfway from (71, 44, 122) to (59, 81, 139)
        pytest.approx(value, abs=1) for value in (65, 62.5, 130.5)
    ]


def test_larger_entries_are_lighter():
    values = torch.linspace(-2, 7, 500)
    image = colors(values[torch.randperm(500)].reshape(20, 25)).double()
    assert image.shape == (20, 25, 3)
    ordered = colors(values[None]).double()[0]
    lightness = ordered @ torch.tensor([0.2126, 0.7152, 0.0722]).double()
    assert (lightness.diff() >= -0.5).all()  # colors are whole numbers
    assert lightness.diff().gt(0).sum() > 200
    assert (ordered[:, 1].diff() >= 0).all()


def test_image_does_not_depend_on_offset_and_scale():
    matrix = torch.randn(6, 6, dtype=torch.float64)
    shifted = heat_map(1e-9 * matrix - 40).int() - heat_map(matrix).int()
    assert shifted.abs().max() <= 1  # a rounding apart
    torch.testing.assert_close(heat_map(1024 * matrix), heat_map(matrix))


@pytest.mark.parametrize("value", [0.0, -2.5, 1e30, 5e-324])
def test_a_constant_is_one_color(value):
    image = colors(torch.full((3, 4), value, dtype=torch.float64))
    assert image.tolist() == [[DARK] * 4] * 3


@pytest.mark.parametrize("gap", [math.nan, math.inf, -math.inf])
def test_entries_that_are_not_finite_are_gray_and_leave_the_scale_alone(gap):
    image = colors(torch.tensor([[0.0, gap], [1.0, 2.0]]))
    assert image.tolist() == [[DARK, GRAY], [MIDDLE, YELLOW]]


def test_without_a_finite_entry_all_is_gray():
    matrix = torch.tensor([[math.nan, math.inf]])
    assert colors(matrix).tolist() == [[GRAY, GRAY]]


@pytest.mark.parametrize(
    ("shape", "height", "width"),
    [
        ((64, 64), 256, 256),
        ((60, 60), 300, 300),  # whole squares, so the next size up
        ((300, 300), 300, 300),
        ((1, 1), 256, 256),
        ((2, 6), 256, 768),
        ((6, 2), 768, 256),
    ],
)
def test_every_entry_is_a_square_and_the_shorter_side_is_long_enough(
    shape, height, width
):
    matrix = torch.randn(shape)
    image = heat_map(matrix)
    assert image.shape == (3, height, width)
    assert image.dtype == torch.uint8
    side = height // shape[0]
    squares = image.unfold(1, side, side).unfold(2, side, side)
    torch.testing.assert_close(
        squares, squares[..., :1, :1].expand_as(squares), rtol=0, atol=0
    )
    torch.testing.assert_close(
        squares[..., 0, 0].permute(1, 2, 0), colors(matrix), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("shape", "max_side", "square"),
    [((6, 6), 6, 1), ((6, 6), 3, 2), ((7, 5), 6, 2), ((20, 4), 7, 3)],
)
def test_a_matrix_too_large_to_draw_is_averaged_over_squares(shape, max_side, square):
    matrix = torch.randn(shape, dtype=torch.float64)
    rows = [
        [part.mean() for part in band.split(square, dim=1)]
        for band in matrix.split(square)
    ]
    expected = heat_map(torch.tensor(rows, dtype=torch.float64), min_side=1)
    image = heat_map(matrix, min_side=1, max_side=max_side)
    assert max(image.shape[1:]) <= max_side
    torch.testing.assert_close(image, expected, rtol=0, atol=0)


def test_the_average_over_a_gap_is_gray():
    matrix = torch.eye(4)
    matrix[0, 3] = math.nan
    image = heat_map(matrix, min_side=1, max_side=2)
    assert image.permute(1, 2, 0).tolist() == [[YELLOW, GRAY], [DARK, YELLOW]]


def test_kernels_of_thousands_of_examples_take_little_room():
    assert heat_map(torch.zeros(1025, 1025)).shape == (3, 342, 342)


def test_rows_go_down_and_columns_to_the_right():
    matrix = torch.zeros(3, 4)
    matrix[0, 3] = 1
    bright = np.argwhere((heat_map(matrix, min_side=3)[0] == YELLOW[0]).numpy())
    assert bright.tolist() == [[0, 3]]


@pytest.mark.parametrize(
    "matrix",
    [
        torch.tensor([[0, 1], [2, 4]]),
        torch.tensor([[0.0, 1.0], [2.0, 4.0]], dtype=torch.bfloat16),
        torch.tensor([[0.0, 1.0], [2.0, 4.0]], requires_grad=True),
        torch.tensor([[0.0, 2.0], [1.0, 4.0]]).T,
    ],
    ids=["integers", "bfloat16", "with gradient", "transposed view"],
)
def test_any_real_matrix_will_do(matrix):
    expected = heat_map(torch.tensor([[0.0, 1.0], [2.0, 4.0]]))
    torch.testing.assert_close(heat_map(matrix), expected)


def test_truth_values_are_drawn_as_0_and_1():
    assert colors(torch.tensor([[False, True]])).tolist() == [[DARK, YELLOW]]


def test_the_matrix_itself_stays_as_it_is():
    matrix = torch.tensor([[math.nan, 1.0], [2.0, 3.0]], dtype=torch.float64)
    before = matrix.clone()
    heat_map(matrix)
    torch.testing.assert_close(matrix, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(), (3,), (2, 2, 2), (0, 3), (3, 0), (0, 0)])
def test_anything_but_a_matrix_with_entries_is_refused(shape):
    with pytest.raises(ValueError, match=r"expected a matrix, got \("):
        heat_map(torch.zeros(shape))

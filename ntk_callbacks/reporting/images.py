"""Matrices as images, without a plotting library."""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

# Nine evenly spaced colors of the viridis map (Smith, van der Walt 2015, CC0).
_COLORS = torch.tensor(
    [
        (68, 1, 84),
        (71, 44, 122),
        (59, 81, 139),
        (44, 113, 142),
        (33, 144, 141),
        (39, 173, 129),
        (92, 200, 99),
        (170, 220, 50),
        (253, 231, 37),
    ],
    dtype=torch.float64,
)


def heat_map(matrix: Tensor, min_side: int = 256, max_side: int = 512) -> Tensor:
    """A matrix as an RGB image, the smallest entry dark, the largest yellow.

    Args:
        matrix: Two-dimensional, of any real dtype; non-finite entries are drawn gray.
        min_side: Every entry becomes a square of pixels, so that the shorter side has
            at least this many.
        max_side: A matrix with more rows or columns is averaged over squares of
            entries first: an image of thousands of rows takes megabytes in a log.

    Returns:
        Tensor (3, height, width) of uint8 on the CPU.

    Raises:
        ValueError: If the matrix is not two-dimensional or has no entries.

    Example:
        >>> heat_map(torch.eye(2), min_side=4)[:, 0, 0].tolist()
        [253, 231, 37]
    """
    if matrix.ndim != 2 or not matrix.numel():
        raise ValueError(f"heat_map: expected a matrix, got {tuple(matrix.shape)}.")
    values = matrix.detach().cpu().double()
    if max(values.shape) > max_side:
        merged = -(-max(values.shape) // max_side)
        values = avg_pool2d(values[None], merged, ceil_mode=True)[0]
    finite = values.isfinite()
    low, high = values[finite].aminmax() if finite.any() else (0.0, 1.0)
    span = high - low if high > low else 1.0
    position = ((values - low) / span).nan_to_num(0.0, 1.0, 0.0)
    position = position.clamp(0, 1) * (len(_COLORS) - 1)
    below = position.floor().long().clamp(max=len(_COLORS) - 2)
    share = (position - below)[..., None]
    colors = (1 - share) * _COLORS[below] + share * _COLORS[below + 1]
    colors[~finite] = 128.0
    repeat = -(-min_side // min(values.shape))
    image = colors.round().to(torch.uint8).permute(2, 0, 1)
    return image.repeat_interleave(repeat, 1).repeat_interleave(repeat, 2)

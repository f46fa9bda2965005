"""Matrices as images, without a plotting library."""

import struct
import zlib

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


def heat_map(
    matrix: Tensor,
    min_side: int = 256,
    max_side: int = 512,
    limits: tuple[float, float] | None = None,
) -> Tensor:
    """A matrix as an RGB image, the smallest entry dark, the largest yellow.

    Args:
        matrix: Two-dimensional, of any real dtype; non-finite entries are drawn gray.
        min_side: Every entry becomes a square of pixels, so that the shorter side has
            at least this many.
        max_side: A matrix with more rows or columns is averaged over squares of
            entries first: an image of thousands of rows takes megabytes in a log.
        limits: What is to be darkest and yellow, for several images with the same
            colors; the smallest and the largest entry by default.

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
    low, high = limits or finite_limits(values)
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


def finite_limits(values: Tensor) -> tuple[float, float]:
    """The smallest and the largest finite entry; 0 and 1 if there is none.

    Args:
        values: Of any shape and real dtype.

    Returns:
        Two numbers.

    Example:
        >>> finite_limits(torch.tensor([3.0, float("nan"), 1.0]))
        (1.0, 3.0)
    """
    finite = values[values.isfinite()]
    return (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)


def png(image: Tensor) -> bytes:
    """An image as a PNG file.

    Args:
        image: (3, height, width) of uint8.

    Returns:
        The contents of the file.

    Raises:
        ValueError: If it is no such tensor.

    Example:
        >>> png(heat_map(torch.eye(2)))[1:4]
        b'PNG'
    """
    if image.ndim != 3 or len(image) != 3 or image.dtype != torch.uint8:
        raise ValueError(
            f"png: expected (3, height, width) of uint8, got {tuple(image.shape)} of "
            f"{image.dtype}."
        )
    _, height, width = image.shape
    rows = image.permute(1, 2, 0).reshape(height, 3 * width).cpu()
    unfiltered = torch.zeros(height, 1, dtype=torch.uint8)
    pixels = torch.cat([unfiltered, rows], dim=1).numpy().tobytes()
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    chunks = {b"IHDR": head, b"IDAT": zlib.compress(pixels, 9), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", _crc(kind, data))
        for kind, data in chunks.items()
    )


def _crc(kind: bytes, data: bytes) -> int:
    return zlib.crc32(kind + data)

"""Numbers on images, in a font of 3×5 dots: TensorBoard draws no axes around images."""

import torch
from torch import Tensor

_ROWS = 5
# Rows from the top, of three bits each.
_GLYPHS = {
    "0": (7, 5, 5, 5, 7),
    "1": (2, 6, 2, 2, 7),
    "2": (7, 1, 7, 4, 7),
    "3": (7, 1, 3, 1, 7),
    "4": (5, 5, 7, 1, 1),
    "5": (7, 4, 7, 1, 7),
    "6": (7, 4, 7, 5, 7),
    "7": (7, 1, 1, 2, 2),
    "8": (7, 5, 7, 5, 7),
    "9": (7, 5, 7, 1, 7),
    "e": (0, 7, 7, 4, 7),
    "k": (4, 5, 6, 5, 5),
    "M": (5, 7, 7, 5, 5),
    "-": (0, 0, 7, 0, 0),
    ".": (0, 0, 0, 0, 2),
}


def text_image(text: str, scale: int = 2) -> Tensor:
    """A word as dots.

    Args:
        text: Digits and any of `e k M - .`; what has no dots leaves a space.
        scale: Side of a dot in pixels.

    Returns:
        Bool tensor (5·scale, 4·scale·characters), True where there is ink.

    Example:
        >>> text_image("7", scale=1).int()[:, :3].tolist()
        [[1, 1, 1], [0, 0, 1], [0, 0, 1], [0, 1, 0], [0, 1, 0]]
    """
    dots = torch.zeros(_ROWS, 4 * len(text), dtype=torch.bool)
    for place, character in enumerate(text):
        for row, bits in enumerate(_GLYPHS.get(character, ())):
            for column in range(3):
                dots[row, 4 * place + column] = bool(bits >> (2 - column) & 1)
    return dots.repeat_interleave(scale, 0).repeat_interleave(scale, 1)


def write(image: Tensor, text: str, top: int, left: int, scale: int = 2) -> None:
    """Write a word onto an image, black; what lies outside is cut off.

    Args:
        image: (3, height, width) of uint8, changed in place.
        text: As in `text_image`.
        top: Row of the upper end.
        left: Column of the left end.
        scale: Side of a dot in pixels.
    """
    dots = text_image(text, scale)
    _, height, width = image.shape
    top, left = max(top, 0), max(left, 0)
    dots = dots[: height - top, : width - left]
    part = image[:, top : top + dots.shape[0], left : left + dots.shape[1]]
    part[:, dots] = 0

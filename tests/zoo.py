"""Real architectures, small but built as they are found: the table of all."""

from zoo_language import LANGUAGE
from zoo_parameters import PARAMETERS
from zoo_sequences import SEQUENCES
from zoo_vision import VISION, VISION_SLOW

ZOO = [*VISION, *LANGUAGE, *SEQUENCES, *PARAMETERS]
"""Each takes a second or two."""

ZOO_SLOW = VISION_SLOW
"""Networks of torchvision with millions of parameters."""

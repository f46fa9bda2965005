"""Tables of kernels at infinite width, and the points they are of."""

import json
import math
from pathlib import Path

import torch

TABLES = json.loads(
    (Path(__file__).parent / "fixtures" / "nngp_and_ntk.json").read_text()
)

ROOT2 = math.sqrt(2)


def tensor(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


X = tensor(TABLES["x"])

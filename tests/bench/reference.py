"""The float64 block that errors are measured against, written once for each case."""

import copy
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bench.models import build
from bench.roster import Case


def exact_kernel(model: nn.Module, x: Tensor) -> Tensor:
    """Θ of shape (m, m, c, c) in float64: plain autograd, one output at a time."""
    model, x = copy.deepcopy(model).double(), x.double()
    params = list(model.parameters())
    rows = [
        torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(output, params, retain_graph=True)
            ]
        )
        for example in x
        for output in model(example[None])[0]
    ]
    jacobian = torch.stack(rows)
    kernel = (jacobian @ jacobian.mT).unflatten(1, (len(x), -1))
    return kernel.unflatten(0, (len(x), -1)).transpose(1, 2)


def write(case: Case, path: str) -> int:
    """Save weights, inputs and the exact block; returns the number of parameters."""
    model, x = build(case)
    arrays = {f"weights/{k}": v.numpy() for k, v in model.state_dict().items()}
    exact = exact_kernel(model, x[case.checked]).numpy()
    np.savez(path, x=x.numpy(), exact=exact, **arrays)
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    print(write(Case(**json.loads(sys.argv[1])), str(Path(sys.argv[2]))))

"""J of a model as a matrix, and the operator that multiplies with it."""

import logging
import re
from functools import cache

import pytest
import torch
from oracles import call, jacobian_by_loop
from torch import nn

from ntk_callbacks.engine.products import TangentOperator

# Round-off of float64 over at most some thousand additions is below 1e-12; formulas
# that cancel (the normalizations) lose two or three digits more.
TOLERANCE = 1e-9

# torch.compile looks at the `.grad` of what enters the compiled part.
GRAD_IS_LOOKED_AT = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)


def dense(model, x, output_fn=call, names=None):
    """J as a matrix: rows example-major, parameters one after the other."""
    blocks = jacobian_by_loop(model, x, output_fn, names)
    rows = {name: block.flatten(0, 1) for name, block in blocks.items()}
    return torch.cat([block.reshape(len(block), -1) for block in rows.values()], 1)


@cache
def dense_of(case):
    return dense(*case.build(), case.output_fn)


def operator_of(case, **options):
    model, x = case.build()
    output_fn = None if case.output_fn is call else case.output_fn
    return TangentOperator(model, x, output_fn=output_fn, mode=case.mode, **options)


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def way_of(operator, caplog):
    with caplog.at_level(logging.INFO, "ntk_callbacks.engine.linearization"):
        operator.jvp(random(operator.shape[1]))
    (record,) = caplog.records
    return re.match(r"J·v by (\w+ \w+)", record.getMessage())[1]


class Counting(nn.Sequential):
    """Counts how often it is put into a mode."""

    prepared = 0

    def train(self, mode=True):
        type(self).prepared += 1
        return super().train(mode)

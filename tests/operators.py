"""Kernels as matrices and as operators, of networks and of known spectra."""

import torch
from cases import BY_ID
from oracles import call, ntk_by_loop
from torch import nn

from ntk_callbacks import as_matrix
from ntk_callbacks.engine.products import TangentOperator

MODELS = [
    *("mlp", "cnn", "resnet", "resnet_train", "gru", "attention", "tied_weights"),
    *("embedding_padding", "weight_norm", "batch_norm_untracked", "frozen_layer"),
]


def kernel_and_operator(name):
    case = BY_ID[name]
    model, x = case.build()
    kernel = as_matrix(ntk_by_loop(model, x, output_fn=case.output_fn))
    output_fn = None if case.output_fn is call else case.output_fn
    return kernel, TangentOperator(model, x, output_fn=output_fn, mode=case.mode)


def operator_of(spectrum, c=1, dtype=torch.float64):
    """A linear model whose kernel has a known spectrum, each eigenvalue c times."""
    m = len(spectrum)
    rotation = torch.linalg.qr(torch.randn(m, m, dtype=torch.float64)).Q
    x = rotation * spectrum.double().sqrt()
    return TangentOperator(nn.Linear(m, c, bias=False).to(dtype), x.to(dtype))


def power_law(m, exponent):
    return 100 * torch.arange(1, m + 1, dtype=torch.float64) ** -exponent


def moments(density, orders):
    return [(density.weights * density.nodes**order).sum().item() for order in orders]


def values(result):
    fields = type(result).__dataclass_fields__
    return [torch.as_tensor(getattr(result, name)) for name in fields]

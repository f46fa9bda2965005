"""Linearized twins that are moved away from where they were taken."""

import torch


def displaced(twin, size=0.1):
    """Moves the trained parameters; returns by how much."""
    steps = {}
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            steps[name] = size * torch.randn_like(parameter)
            parameter.data += steps[name]
    return steps


def pulled(row, weights):
    """Jᵀu of one parameter."""
    weights = weights.reshape(*weights.shape, *[1] * (row.ndim - 2))
    return (row * weights).sum((0, 1))

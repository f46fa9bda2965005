"""Data sets of all kinds that probes are drawn from."""

# ruff: noqa: NPY002 (the legacy generator of NumPy is what data sets draw from)
import random

import numpy.random
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset


def data(n=20, classes=4):
    return TensorDataset(torch.randn(n, 3), torch.arange(n) % classes)


class Augmented(Dataset):
    """Draws from all three global generators for every example, as transforms do."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        noise = [random.random(), numpy.random.rand(), torch.rand(()).item()]
        return index + torch.tensor(noise), index % 3


class Stream(IterableDataset):
    """Can be read once: an iterator that remembers how far it got."""

    def __init__(self, n=10):
        self.rows = iter([(torch.full((2,), float(i)), i % 2) for i in range(n)])

    def __iter__(self):
        return self.rows

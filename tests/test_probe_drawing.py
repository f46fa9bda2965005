"""What is drawn: the same examples for a seed, without repetition, by class."""

import pytest
import torch
from data_sets import Augmented, Stream, data
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
)

from ntk_callbacks import Probe
from ntk_callbacks.errors import ProbeError


class FromFile(IterableDataset):
    """Opens its source anew for every pass."""

    def __init__(self, n=10):
        self.n = n

    def __iter__(self):
        return ((torch.full((2,), float(i)), i % 2) for i in range(self.n))


def test_the_same_seed_draws_the_same_examples():
    loader = DataLoader(data(), 4, shuffle=True)
    first = Probe.from_loader(loader, 6, seed=1)
    torch.rand(7)
    assert Probe.from_loader(loader, 6, seed=1).digest == first.digest
    assert Probe.from_loader(loader, 6, seed=2).digest != first.digest


def test_random_transforms_give_the_same_probe_again():
    loader = DataLoader(Augmented(), 4)
    first = Probe.from_loader(loader, 6)
    for _ in loader:
        pass
    assert Probe.from_loader(loader, 6).digest == first.digest


def test_examples_are_drawn_without_repetition():
    inputs = torch.arange(20.0)[:, None]
    loader = DataLoader(TensorDataset(inputs, inputs), 4)
    probe = Probe.from_loader(loader, 20)
    assert not torch.equal(probe.inputs, inputs)
    assert torch.equal(probe.inputs.sort(0).values, inputs)
    assert torch.equal(probe.inputs, probe.targets)


def index_loaders():
    dataset = TensorDataset(torch.arange(20.0)[:, None], torch.arange(20) % 2)
    chosen = [11, 3, 8, 17, 6, 3, 4]
    subset = SubsetRandomSampler(chosen, torch.Generator().manual_seed(1))
    of_tensor = SubsetRandomSampler(torch.tensor(chosen))
    shared = DistributedSamplerWrapper(subset, num_replicas=2, rank=0)
    return {
        "subset": DataLoader(dataset, 2, sampler=subset),
        "tensor": DataLoader(dataset, 2, sampler=of_tensor),
        "batches": DataLoader(dataset, batch_sampler=BatchSampler(subset, 2, False)),
        "several processes": DataLoader(dataset, 2, sampler=shared),
    }


@pytest.mark.parametrize("name", index_loaders())
def test_only_the_indices_of_the_sampler_are_drawn(name):
    loader = index_loaders()[name]
    first = Probe.from_loader(loader, 3, seed=None)
    assert first.inputs[:, 0].tolist() == [11, 3, 8]
    every = Probe.from_loader(loader, 6)
    assert sorted(every.inputs[:, 0].tolist()) == [3, 4, 6, 8, 11, 17]
    halves = Probe.from_loader(loader, 6, balanced=True)
    assert sorted(halves.inputs[:, 0].tolist()) == [3, 4, 6, 8, 11, 17]
    with pytest.raises(ProbeError, match="hold 6 examples"):
        Probe.from_loader(loader, 7)


def test_the_sampler_with_indices_does_not_notice():
    seen = []
    for drawn in (False, True):
        torch.manual_seed(0)
        loader = index_loaders()["subset"]
        if drawn:
            Probe.from_loader(loader, 3)
        seen.append([x.tolist() for x, _ in loader])
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    "indices", [iter([1, 2]), {0: [1, 2]}, [[1, 2], [3]], ["a"], lambda: [1], None]
)
def test_indices_that_are_something_else_are_left_alone(indices):
    sampler = RandomSampler(range(20))
    sampler.indices = indices
    assert Probe.from_loader(DataLoader(data(), sampler=sampler), 20).n == 20
    if hasattr(indices, "__next__"):
        assert next(indices) == 1


def test_without_a_seed_the_first_examples_are_taken_in_order():
    dataset = data()
    probe = Probe.from_loader(DataLoader(dataset, 4, shuffle=True), 5, seed=None)
    assert torch.equal(probe.inputs, dataset.tensors[0][:5])
    assert torch.equal(probe.targets, dataset.tensors[1][:5])


@pytest.mark.parametrize("seed", [0, None])
def test_balanced(seed):
    dataset = TensorDataset(
        torch.randn(30, 2), torch.tensor([0] * 20 + [7] * 6 + [3] * 4)
    )
    probe = Probe.from_loader(DataLoader(dataset, 4), 8, balanced=True, seed=seed)
    assert probe.targets.tolist() == [0, 0, 0, 3, 3, 3, 7, 7]
    rows = {tuple(x.tolist()): y.item() for x, y in zip(*dataset.tensors, strict=True)}
    found = [rows[tuple(x.tolist())] for x in probe.inputs]
    assert found == probe.targets.tolist()
    assert len({tuple(x.tolist()) for x in probe.inputs}) == 8


def test_balanced_needs_classes_and_enough_of_each():
    few = TensorDataset(torch.randn(10, 2), torch.tensor([0] * 9 + [1]))
    with pytest.raises(ProbeError, match="need 2 of class 1; the data hold 1"):
        Probe.from_loader(DataLoader(few), 4, balanced=True)
    real = TensorDataset(torch.randn(10, 2), torch.randn(10))
    with pytest.raises(ProbeError, match="one class index"):
        Probe.from_loader(DataLoader(real), 4, balanced=True)
    with pytest.raises(ProbeError, match="one class index"):
        Probe.from_loader(
            DataLoader(TensorDataset(torch.randn(9, 2))), 4, balanced=True
        )


def test_the_loaders_own_collate_function_is_used():
    def collate(samples):
        return {"x": torch.stack([x for x, _ in samples]) * 10, "y": None}

    probe = Probe.from_loader(DataLoader(data(), 4, collate_fn=collate), 4, seed=None)
    assert probe.targets is None
    expected = Probe.from_loader(DataLoader(data(), 4), 4, seed=None)
    assert probe.inputs.shape == expected.inputs.shape


def test_streams_give_their_first_examples_and_are_not_consumed():
    stream = Stream()
    probe = Probe.from_loader(DataLoader(stream, 4), 3)
    assert probe.inputs[:, 0].tolist() == [0, 1, 2]
    assert probe.targets.tolist() == [0, 1, 0]
    assert len(list(stream.rows)) == 10
    reopened = Probe.from_loader(DataLoader(FromFile(), 4), 3)
    assert reopened.digest == probe.digest


def test_a_stream_that_cannot_be_copied_is_refused_not_consumed():
    stream = FromFile()
    stream.source = iter(stream)  # a generator: reading it is the only way
    stream.__class__ = type("Generator", (FromFile,), {"__iter__": lambda s: s.source})
    with pytest.raises(ProbeError, match="cannot be copied"):
        Probe.from_loader(DataLoader(stream, 4), 3)
    assert len(list(stream.source)) == 10


def test_too_few_examples():
    with pytest.raises(ProbeError, match="hold 20 examples, fewer than the 21"):
        Probe.from_loader(DataLoader(data(), 4), 21)
    with pytest.raises(ProbeError, match="hold 10 examples"):
        Probe.from_loader(DataLoader(Stream(), 4), 11)
    with pytest.raises(ProbeError, match="at least 1"):
        Probe.from_loader(DataLoader(data(), 4), 0)


@pytest.mark.parametrize("balanced", [False, True])
def test_no_example(balanced):
    empty = TensorDataset(torch.zeros(0, 2), torch.zeros(0).long())
    with pytest.raises(ProbeError, match=r"hold 0 examples|empty"):
        Probe.from_loader(DataLoader(empty), 4, balanced=balanced)


def test_loaders_that_cannot_be_drawn_from():
    with pytest.raises(ProbeError, match="list has no `dataset`"):
        Probe.from_loader([torch.zeros(2, 2)], 1)
    with pytest.raises(ProbeError, match="batch_size=None"):
        Probe.from_loader(DataLoader(data(), batch_size=None), 2)
    triples = TensorDataset(torch.zeros(4, 2), torch.zeros(4), torch.zeros(4))
    with pytest.raises(ProbeError, match=r"a list of 3.*Probe\(\(x, lengths\), y\)"):
        Probe.from_loader(DataLoader(triples), 2)

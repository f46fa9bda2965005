"""Drawing a probe leaves no trace in the run that reads the same data."""

# ruff: noqa: NPY002 (the legacy generator of NumPy is what data sets draw from)
import pickle
import random
import sys
from collections import Counter

import numpy.random
import pytest
import torch
from data_sets import Augmented, Stream, data
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    RandomSampler,
    Subset,
    WeightedRandomSampler,
)

from ntk_callbacks import Probe


class Seeded(Dataset):
    """Has generators of its own, as some libraries of augmentations do."""

    def __init__(self):
        self.torch = torch.Generator().manual_seed(1)
        self.transforms = [{"numpy": numpy.random.default_rng(1)}, random.Random(1)]
        self.legacy = numpy.random.RandomState(1)

    def __len__(self):
        return 12

    def __getitem__(self, index):
        first, second = self.transforms
        noise = [
            torch.rand((), generator=self.torch).item(),
            first["numpy"].random(),
            second.random() + self.legacy.rand(),
        ]
        return index + torch.tensor(noise), index % 3


def loaders():
    generator = torch.Generator().manual_seed(5)
    sampler = RandomSampler(data(), generator=torch.Generator().manual_seed(6))
    weighted = WeightedRandomSampler(torch.rand(20), 20)
    return {
        "shuffled": DataLoader(data(), 4, shuffle=True),
        "own_generator": DataLoader(data(), 4, shuffle=True, generator=generator),
        "sampler": DataLoader(data(), 4, sampler=sampler),
        "weighted": DataLoader(data(), 4, sampler=weighted),
        "augmented": DataLoader(Augmented(), 4, shuffle=True),
        "seeded": DataLoader(Seeded(), 4, shuffle=True),
        "stream": DataLoader(Stream(), 4),
    }


def everything_a_run_reads(loader):
    """Two epochs, then a draw from every generator."""
    batches = [torch.cat([x, y[:, None]], 1) for _ in range(2) for x, y in loader]
    draws = torch.tensor([random.random(), numpy.random.rand(), torch.rand(()).item()])
    return [*batches, draws]


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("seed", [0, 3, None])
@pytest.mark.parametrize("name", loaders())
def test_training_reads_the_same_batches_after_a_draw(name, seed, balanced):
    seen = []
    for drawn in (False, True):
        torch.manual_seed(0)
        random.seed(0)
        numpy.random.seed(0)
        loader = loaders()[name]
        if drawn:
            Probe.from_loader(loader, 6, balanced=balanced, seed=seed)
        seen.append(everything_a_run_reads(loader))
    assert len(seen[0]) == len(seen[1]) > 3
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_a_draw_in_the_middle_of_an_epoch_does_not_disturb_it():
    loader = DataLoader(data(), 4, shuffle=True)
    expected = [x.clone() for x, _ in loader]
    torch.manual_seed(0)
    loader = DataLoader(data(), 4, shuffle=True)
    seen = []
    for x, _ in loader:
        seen.append(x.clone())
        Probe.from_loader(loader, 5)
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


class Lazy(Dataset):
    """Opens its file on first use, as readers of HDF5 or LMDB do; counts its reads."""

    def __init__(self, path, fails_at=None):
        self.path, self.fails_at = path, fails_at
        self.file, self.more, self.reads = None, {}, 0
        self.log, self.seen = [], set()
        self.counts = Counter({-1: 1})
        self.opened = opened = []
        self.open = lambda: opened.append(open(path)) or opened[-1]  # noqa: SIM115, PTH123

    def __getstate__(self):
        return {**vars(self), "open": None, "opened": None}

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == self.fails_at:
            raise KeyError("unreadable")
        if self.file is None:
            self.file = self.open()
            self.more["again"] = self.open()
            self.parts = [self.open()]
            self.backend = sys  # with a `close` or not, a module is not ours
        self.reads += 1
        self.log.append(index)
        self.seen.add(index)
        self.counts[index] += 1
        return torch.tensor([float(index)]), index % 2


class Wrapper:
    """Of a user; not even a `Dataset`, and it knows its child, which knows it."""

    def __init__(self, dataset):
        self.dataset, self.reads = dataset, 0
        dataset.parent = self

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        self.reads += 1
        return self.dataset[index]


WRAPPERS = {
    "bare": lambda inner: inner,
    "subset": lambda inner: Subset(inner, range(7)),
    "concatenated": lambda inner: ConcatDataset([Subset(inner, range(7)), inner]),
    "of a user": Wrapper,
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("data")
    return path


@pytest.mark.parametrize("fails_at", [None, 5])
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_the_state_of_the_data_set_is_put_back(path, wrap, balanced, fails_at):
    inner = Lazy(path, fails_at)
    dataset = wrap(inner)
    opened, containers = inner.opened, (inner.more, inner.log, inner.seen, inner.counts)
    before = set(vars(inner))
    loader = DataLoader(dataset)
    if fails_at is None:
        assert Probe.from_loader(loader, 6, balanced=balanced).n == 6
    else:
        with pytest.raises(KeyError, match="unreadable"):
            Probe.from_loader(loader, len(dataset), balanced=balanced)
    assert vars(inner).keys() == before
    assert inner.file is None
    assert inner.reads == getattr(dataset, "reads", 0) == 0
    assert inner.more == {}
    assert inner.log == []
    assert inner.seen == set()
    assert inner.counts == {-1: 1}
    after = (inner.more, inner.log, inner.seen, inner.counts)
    assert all(a is b for a, b in zip(after, containers, strict=True))
    pickle.dumps(dataset)
    assert inner.opened == []
    assert opened is inner.opened


@pytest.mark.parametrize("fails", [False, True])
def test_what_was_opened_for_the_probe_is_closed_and_nothing_else(path, fails):
    opened = []

    class Reader(Dataset):
        def __init__(self):
            self.old, self.file, self.current = path.open(), None, None
            self.shards, self.files = [path.open()], {}

        def __len__(self):
            return 4

        def __getitem__(self, index):
            if self.file is None:
                opened.extend(path.open() for _ in range(3))
                self.file, self.files["a"] = opened[:2]
                self.both = (opened[2], 1)
            self.current = self.shards[0]
            self.replaced, self.old = self.old, None
            if fails:
                raise KeyError("unreadable")
            self.old = self.replaced
            return torch.tensor([float(index)])

    dataset = Reader()
    old, shard = dataset.old, dataset.shards[0]
    if fails:
        with pytest.raises(KeyError):
            Probe.from_loader(DataLoader(dataset), 2)
    else:
        Probe.from_loader(DataLoader(dataset), 2)
    assert [file.closed for file in opened] == [True, True, True]
    assert dataset.old is old
    assert not old.closed
    assert dataset.shards == [shard]
    assert not shard.closed
    assert dataset.file is dataset.current is None
    old.close()
    shard.close()


def test_a_handle_that_cannot_be_closed_is_let_go():
    class Stubborn:
        def close(self):
            raise BufferError("in use")

    class Reader(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            self.file = Stubborn()
            return torch.tensor([float(index)])

    dataset = Reader()
    assert Probe.from_loader(DataLoader(dataset), 2).n == 2
    assert vars(dataset) == {}

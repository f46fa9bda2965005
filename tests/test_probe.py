"""Drawing a probe disturbs nothing, and a probe is what it says it is."""

# ruff: noqa: NPY002 (the legacy generator of NumPy is what data sets draw from)
import pickle
import random
import re
import sys
from collections import Counter

import numpy.random
import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from scripts import run_script
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from ntk_callbacks import Probe, empirical_ntk
from ntk_callbacks.errors import ProbeError


def data(n=20, classes=4):
    return TensorDataset(torch.randn(n, 3), torch.arange(n) % classes)


def printed(code, folder):
    """What code prints in a process of its own."""
    script = folder / "script.py"
    script.write_text(code)
    exit_code, output, errors = run_script(script, folder)
    assert exit_code == 0, errors
    return output


class Augmented(Dataset):
    """Draws from all three global generators for every example, as transforms do."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        noise = [random.random(), numpy.random.rand(), torch.rand(()).item()]
        return index + torch.tensor(noise), index % 3


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


class Dictionaries(Dataset):
    def __init__(self, **columns):
        self.columns = columns

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index):
        return {name: column[index] for name, column in self.columns.items()}


class Stream(IterableDataset):
    """Can be read once: an iterator that remembers how far it got."""

    def __init__(self, n=10):
        self.rows = iter([(torch.full((2,), float(i)), i % 2) for i in range(n)])

    def __iter__(self):
        return self.rows


class FromFile(IterableDataset):
    """Opens its source anew for every pass."""

    def __init__(self, n=10):
        self.n = n

    def __iter__(self):
        return ((torch.full((2,), float(i)), i % 2) for i in range(self.n))


# Drawing leaves no trace.


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


# What is drawn.


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


# Kinds of batches.


def test_pairs_singles_and_bare_tensors():
    x, y = torch.randn(6, 3), torch.arange(6)
    loader = DataLoader(TensorDataset(x, y))
    pair = Probe.from_loader(loader, 6, seed=None)
    assert torch.equal(pair.inputs, x)
    assert torch.equal(pair.targets, y)
    single = Probe.from_loader(DataLoader(TensorDataset(x)), 6, seed=None)
    assert torch.equal(single.inputs, x)
    assert single.targets is None
    bare = Probe.from_loader(DataLoader(list(x)), 6, seed=None)
    assert torch.equal(bare.inputs, x)


@pytest.mark.parametrize("inputs", ["x", "image", "features"])
@pytest.mark.parametrize("targets", ["y", "label", "targets"])
def test_mappings_with_an_obvious_key(inputs, targets):
    x, y = torch.randn(6, 3), torch.arange(6)
    dataset = Dictionaries(**{targets: y, inputs: x, "name": list("abcdef")})
    probe = Probe.from_loader(DataLoader(dataset), 6, seed=None)
    assert torch.equal(probe.inputs, x)
    assert torch.equal(probe.targets, y)


def test_mappings_of_keyword_arguments():
    """Batches as tokenizers make them: all tensors but the labels go to the model."""
    ids = torch.randint(0, 9, (6, 4))
    mask = torch.ones(6, 4).long()
    dataset = Dictionaries(input_ids=ids, attention_mask=mask, labels=torch.arange(6))
    probe = Probe.from_loader(DataLoader(dataset), 6, seed=None)
    assert probe.inputs.keys() == {"input_ids", "attention_mask"}
    assert torch.equal(probe.inputs["input_ids"], ids)
    assert probe.targets.tolist() == list(range(6))
    assert Probe.from_loader(DataLoader(dataset), 6, balanced=True).n == 6


def test_an_obvious_key_with_company_stays_a_keyword():
    """A mask is not dropped because it comes with a key that is called `inputs`."""
    ids, mask = torch.randint(0, 9, (6, 4)), torch.ones(6, 4).long()
    dataset = Dictionaries(inputs=ids, attention_mask=mask, labels=torch.arange(6))
    probe = Probe.from_loader(DataLoader(dataset), 6, seed=None)
    assert probe.inputs.keys() == {"inputs", "attention_mask"}
    assert torch.equal(probe.inputs["inputs"], ids)
    assert torch.equal(probe.inputs["attention_mask"], mask)
    assert probe.targets.tolist() == list(range(6))
    nested = [{"x": ids[i], "deep": {"mask": mask[i]}} for i in range(6)]
    inputs = Probe.from_loader(DataLoader(nested), 6, seed=None).inputs
    assert inputs.keys() == {"x", "deep"}
    assert torch.equal(inputs["deep"]["mask"], mask)


PACKED = pack_padded_sequence(
    torch.ones(3, 2, 1), torch.tensor([2, 2, 1]), batch_first=True
)


@pytest.mark.parametrize(
    "batch",
    [PACKED, (PACKED, torch.arange(3)), {"x": PACKED}, {"a": PACKED, "b": [PACKED]}],
    ids=["bare", "pair", "obvious", "keywords"],
)
def test_packed_sequences_are_refused_with_the_way_out(batch):
    message = r"PackedSequence.*padded tensor and the lengths.*`output_fn` that packs"
    with pytest.raises(ProbeError, match=message):
        Probe.from_loader(DataLoader(data(), collate_fn=lambda samples: batch), 3)
    inputs = batch[0] if type(batch) is tuple else batch
    for found in (inputs, (inputs,), [inputs]):
        with pytest.raises(ProbeError, match=message):
            Probe(found)
    with pytest.raises(ValueError, match=message):
        empirical_ntk(nn.Linear(1, 1), inputs)


def test_mappings_without_an_input():
    dataset = Dictionaries(name=list("abcdef"), label=torch.arange(6))
    with pytest.raises(ProbeError, match=r"no input among the batch keys.*'name'"):
        Probe.from_loader(DataLoader(dataset), 6)


def test_a_probe_of_keywords_goes_straight_into_a_kernel():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 3), nn.Linear(3, 2)

        def forward(self, input_ids, attention_mask=None):
            return self.head(
                (self.embed(input_ids) * attention_mask[..., None]).mean(1)
            )

    ids = torch.randint(0, 9, (6, 4))
    probe = Probe({"input_ids": ids, "attention_mask": torch.ones(6, 4)})
    assert empirical_ntk(Net(), probe.inputs, outputs="trace").shape == (6, 6)


# The probe itself.


def test_properties():
    probe = Probe((torch.zeros(3, 2), {"mask": torch.ones(3)}), torch.arange(3))
    assert probe.n == 3
    assert len(probe.digest) == 64


X2 = torch.zeros(2, 1)


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (torch.zeros(0, 2), None, "no example"),
        (torch.zeros(3, 2), torch.zeros(2), "3 inputs but 2 targets"),
        (torch.zeros(3, 2), torch.tensor(1), "one target to each input"),
        ((torch.zeros(3), torch.zeros(2)), None, "same leading dimension"),
        (torch.tensor(1.0), None, "same leading dimension"),
        ({"flag": True}, None, "at least one tensor"),
        (torch.tensor([[1.0, torch.nan]]), None, "hold NaN"),
        ({"a": torch.ones(1), "b": torch.tensor([torch.nan])}, None, "hold NaN"),
        ({"x": X2, "mask": numpy.zeros(2)}, None, r"hold a ndarray.*torch\.as_tensor"),
        ([[1.0, 2.0]], None, r"list of numbers.*torch\.as_tensor\(inputs\)"),
        ((1, 2), None, r"tuple of numbers.*torch\.as_tensor\(inputs\)"),
    ],
)
def test_malformed_probes(inputs, targets, message):
    with pytest.raises(ProbeError, match=message):
        Probe(inputs, targets)


def test_arguments_that_are_no_tensors(tmp_path):
    """In a process of its own, because the type checker of the tests comes first."""
    code = """
import numpy, torch
from ntk_callbacks import Probe
x = torch.zeros(2, 3)
pair = (torch.zeros(2), torch.zeros(2, 4))
for arguments in [
    (x, [1, 2]), (x, numpy.zeros(2)), (numpy.zeros((2, 3)),), (x, pair)
]:
    try:
        Probe(*arguments)
    except Exception as error:
        print(type(error).__name__, error)
"""
    of_list, of_array, of_inputs, of_pair = printed(code, tmp_path).splitlines()
    as_targets = r"pass torch\.as_tensor\(targets\)"
    assert re.match(rf"ProbeError.*targets are a list.*{as_targets}", of_list)
    assert re.match(rf"ProbeError.*targets are a ndarray.*{as_targets}", of_array)
    assert re.match(r"ProbeError.*hold a ndarray.*torch\.as_tensor", of_inputs)
    assert re.match(
        r"ProbeError.*targets are a tuple.*one tensor \(n, \.\.\.\)", of_pair
    )


def test_infinite_inputs_are_allowed(tmp_path):
    """Additive attention masks hold −∞."""
    mask = torch.tensor([[0.0, -torch.inf], [torch.inf, 0.0]])
    probe = Probe({"x": torch.ones(2, 2), "mask": mask})
    assert torch.equal(probe.inputs["mask"], mask)
    probe.save(tmp_path / "probe.pt")
    assert Probe.load(tmp_path / "probe.pt").digest == probe.digest


def test_a_probe_equals_only_itself():
    probe, same = Probe(torch.zeros(2, 3)), Probe(torch.zeros(2, 3))
    assert probe == probe
    assert probe != same
    assert probe.digest == same.digest
    assert len({probe, same}) == 2


def test_errors_are_value_errors():
    with pytest.raises(ValueError, match="no example"):
        Probe(torch.zeros(0, 2))


X, Y = torch.arange(6.0).view(3, 2), torch.tensor([0, 1, 1])


@pytest.mark.parametrize(
    "other",
    [
        Probe(X),
        Probe(X + 1e-6, Y),
        Probe(X.double(), Y),
        Probe(X.view(3, 2, 1), Y),
        Probe(X.flip(0), Y),
        Probe(X, Y.flip(0)),
        Probe(X, Y.int()),
        Probe((X,), Y),
        Probe((X, Y)),
        Probe({"x": X}, Y),
        Probe({"y": X}, Y),
        Probe({"x": X, "flag": True}, Y),
    ],
)
def test_digest_tells_probes_apart(other):
    assert other.digest != Probe(X, Y).digest


def test_digest_tells_keywords_apart():
    a, b = torch.zeros(2, 2), torch.ones(2, 2)
    assert Probe({"x": a, "y": b}).digest != Probe({"y": a, "x": b}).digest


def test_digest_depends_on_values_only():
    strided = torch.stack([X, X], -1)[..., 0].requires_grad_()
    assert not strided.is_contiguous()
    assert Probe(strided, Y.clone()).digest == Probe(X, Y).digest
    assert Probe(X.bfloat16(), Y > 0).digest == Probe(X.bfloat16(), Y > 0).digest


def test_digest_is_the_same_in_another_process(tmp_path):
    code = (
        "import torch; from ntk_callbacks import Probe;"
        "x = {'x': torch.arange(6.0).view(3, 2), 'flag': None};"
        "print(Probe(x, torch.tensor([0, 1, 1])).digest)"
    )
    assert printed(code, tmp_path).strip() == Probe({"x": X, "flag": None}, Y).digest


def test_to_moves_and_detaches():
    x = X.clone().requires_grad_()
    moved = Probe(x, Y).to("cpu")
    assert not moved.inputs.requires_grad
    assert moved.digest == Probe(X, Y).digest


# Files.


@pytest.mark.parametrize(
    "inputs",
    [X, (X, X + 1), [X], {"x": X, "deep": {"ids": Y}, "flag": True}, X.bfloat16()],
    ids=["tensor", "tuple", "list", "mapping", "bfloat16"],
)
@pytest.mark.parametrize("targets", [None, Y])
def test_round_trip(tmp_path, inputs, targets):
    probe = Probe(inputs, targets)
    probe.save(tmp_path / "probe.pt")
    loaded = Probe.load(str(tmp_path / "probe.pt"))
    assert loaded.digest == probe.digest
    assert type(loaded.inputs) is type(inputs)
    assert (loaded.targets is None) == (targets is None)


def test_round_trip_of_a_probe_from_data(tmp_path):
    probe = Probe.from_loader(DataLoader(data(), 4), 6)
    probe.save(tmp_path / "probe.pt")
    loaded = Probe.load(tmp_path / "probe.pt")
    assert torch.equal(loaded.inputs, probe.inputs)
    assert torch.equal(loaded.targets, probe.targets)


def test_an_altered_file_is_refused(tmp_path):
    path = tmp_path / "probe.pt"
    Probe(X, Y).save(path)
    contents = torch.load(path)
    contents["inputs"][0, 0] += 1
    torch.save(contents, path)
    with pytest.raises(ProbeError, match="was altered"):
        Probe.load(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(ProbeError, match="no file"):
        Probe.load(tmp_path / "probe.pt")
    with pytest.raises(ProbeError, match="no file"):
        Probe.load(tmp_path)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_text("hello"),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\x03\x04 not really"),
        lambda path: torch.save(nn.Linear(2, 2).state_dict(), path),
        lambda path: torch.save([X, Y], path),
        lambda path: torch.save(X, path),
        lambda path: torch.save({"inputs": "x", "targets": Y, "digest": "0"}, path),
        lambda path: torch.save({"inputs": X, "targets": Y, "digest": None}, path),
        lambda path: torch.save(Counter("abc"), path),
    ],
)
def test_a_file_that_is_no_probe(tmp_path, write):
    write(tmp_path / "probe.pt")
    with pytest.raises(ProbeError):
        Probe.load(tmp_path / "probe.pt")

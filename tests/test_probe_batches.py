"""Batches of all kinds become probes: pairs, mappings, keywords; packed ones do not."""

import pytest
import torch
from data_sets import data
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ntk_callbacks import Probe, empirical_ntk
from ntk_callbacks.errors import ProbeError


class Dictionaries(Dataset):
    def __init__(self, **columns):
        self.columns = columns

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index):
        return {name: column[index] for name, column in self.columns.items()}


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

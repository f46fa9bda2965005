"""What the messages of a refusal say works, works."""

import pytest
import torch
from monitored import Plain, examples, fit, loader
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from unmeasurable import NoForward, Tokens, TwoLoaders, TwoResults, token_loader, warned

from ntk_callbacks import JacobianMonitor, NTKMonitor, Probe


class DictBatches(Plain):
    """Batches are mappings with names nobody could guess."""

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch["left"]), batch["right"].argmax(1))


def dict_loader(*names):
    data = [
        {name: torch.randn(width) for name, width in zip(names, (3, 2), strict=True)}
        for _ in range(6)
    ]
    return DataLoader(data, batch_size=3)


def test_output_fn_for_a_module_without_forward():
    monitors = [
        kind(4, 4, output_fn=lambda module, x: module.net(x), on_error="raise")
        for kind in (NTKMonitor, JacobianMonitor)
    ]
    assert [*fit(NoForward(), monitors).recorder.measured()] == [0, 4, 8]


def test_output_fn_for_two_results():
    monitor = NTKMonitor(4, 4, output_fn=lambda m, x: m(x)[0], on_error="raise")
    assert [*fit(TwoResults(), [monitor]).recorder.measured()] == [0, 4, 8]


def test_output_fn_from_the_embeddings_on():
    model = Tokens()
    embedded = model.net[0](torch.arange(8).reshape(4, 2) % 5).detach()
    monitor = JacobianMonitor(
        embedded, 4, output_fn=lambda m, x: m.net[1:](x), on_error="raise"
    )
    run = fit(model, [monitor], train=token_loader())
    assert [*run.recorder.measured()] == [0, 4, 8]
    kernel = NTKMonitor(4, 4, on_error="raise")
    run = fit(Tokens(), [kernel], train=token_loader())
    assert [*run.recorder.measured()] == [0, 4, 8]


@pytest.mark.parametrize(
    "probe",
    [torch.ones(2, 3), Probe(torch.ones(2, 3), torch.tensor([0, 1]))],
    ids=["tensor", "Probe"],
)
def test_own_probe_where_none_can_be_drawn(probe):
    monitor = NTKMonitor(probe, 4, on_error="raise")
    loaders = {"first": loader(), "second": loader(6)}
    measured = fit(TwoLoaders(), [monitor], train=loaders).recorder.measured()
    assert [*measured] == [0, 4, 8]
    assert ("ntk/target_alignment" in measured[0]) == isinstance(probe, Probe)


def test_batches_that_are_mappings_with_obvious_names():
    class Named(Plain):
        def training_step(self, batch, batch_idx):
            return cross_entropy(self(batch["image"]), batch["label"].argmax(1))

    monitors = [NTKMonitor(4, 2, on_error="raise"), JacobianMonitor(4, 2)]
    run = fit(Named(), monitors, train=dict_loader("image", "label"))
    assert [*run.recorder.measured()] == [0, 2, 4]


def test_batches_that_are_mappings_become_keywords():
    class Keywords(DictBatches):
        def forward(self, left, right=None):
            return self.net(left)

    data = dict_loader("left", "right")
    run = fit(Keywords(), [NTKMonitor(4, 2, on_error="raise")], train=data)
    assert [*run.recorder.measured()] == [0, 2, 4]


def test_mapping_the_model_does_not_take_is_refused_once_with_a_way_out():
    """Trying again would not help: the text says how to call the model instead."""
    torch.manual_seed(1)
    data = dict_loader("left", "right")
    run, texts = warned(DictBatches, lambda: NTKMonitor(4, 1), train=data, max_epochs=3)
    (text,) = texts
    assert "DictBatches.forward(x) cannot be called with" in text
    assert "`output_fn=lambda model, x: model(x['left'])`" in text
    assert not run.recorder.measured()


class Generator(Plain):
    """`forward` takes noise, while the batches are images."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)))

    def training_step(self, batch, batch_idx):
        return self(torch.ones(3, 5)).square().mean()


def test_inputs_of_another_shape_are_named_with_a_way_out():
    """What a layer somewhere inside says of its matrices tells a user nothing."""
    _, (text, _) = warned(Generator, lambda: NTKMonitor(4, 100), max_steps=2)
    assert "RuntimeError: mat1 and mat2 shapes cannot be multiplied" in text
    assert "Generator was called with torch.float32 (4, 3)." in text
    assert "`output_fn=lambda model, x: …`" in text


@pytest.mark.parametrize("names", [("x", "deep"), None], ids=["mapping", "pair"])
def test_targets_that_are_no_tensor_are_left_out_with_a_word(names):
    def collate(samples):
        x = torch.stack([x for x, _ in samples])
        targets = {"class": torch.tensor([y for _, y in samples])}
        return {"x": x, "y": targets} if names else (x, targets)

    class Deep(Plain):
        def training_step(self, batch, batch_idx):
            x, y = batch.values() if names else batch
            return cross_entropy(self(x), y["class"])

    data = DataLoader(examples(), 3, collate_fn=collate)
    monitor = NTKMonitor(4, 100, on_error="raise")
    with pytest.warns(UserWarning, match=r"targets of the batch are a dict.*Probe\("):
        run = fit(Deep(), [monitor], train=data)
    assert "ntk/trace" in run.recorder.measured()[0]
    assert "ntk/target_alignment" not in run.recorder.measured()[0]

"""What cannot be measured is said, with what to do; the training does not notice."""

import math
import re

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities import CombinedLoader
from monitored import Plain, examples, fit, loader, same, seeded
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from ntk_callbacks import (
    FeatureMonitor,
    JacobianMonitor,
    LinearizationMonitor,
    LinearizationOptions,
    NTKMonitor,
    NTKOptions,
    ParameterDriftMonitor,
    PredictionMonitor,
    Probe,
    SignalMonitor,
)
from ntk_callbacks.errors import (
    MemoryBudgetError,
    ProbeError,
    ProbeMismatchError,
    UnsupportedModelError,
)


def warned(make_model, make_monitor, **settings):
    """Texts of our warnings; checks that the run ends as one without the monitor."""
    seeded()
    monitor = make_monitor()
    with pytest.warns(UserWarning, match=type(monitor).__name__) as caught:
        run = fit(make_model(), [monitor], **settings)
    seeded()
    bare = fit(make_model(), **settings)
    same(run.trace(), bare.trace())
    texts = [str(warning.message) for warning in caught]
    return run, [text for text in texts if type(monitor).__name__ in text]


def refused(make_model, make_monitor, what, **settings):
    """The text of the one warning of a monitor that stepped aside at once."""
    run, (text,) = warned(make_model, make_monitor, **settings)
    assert re.search(what, text), text
    assert "off for the rest of this run; training goes on" in text
    assert "step 0" in text
    assert not run.recorder.measured()
    return text


class Tokens(Plain):
    """Integer inputs."""

    def __init__(self):
        super().__init__(
            nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2))
        )


def token_loader():
    data = TensorDataset(torch.arange(24).reshape(12, 2) % 5, torch.arange(12) % 2)
    return DataLoader(data, batch_size=3)


class TwoResults(Plain):
    """`forward` returns a tuple of two tensors."""

    def forward(self, x):
        h = self.net[0](x)
        return self.net[1:](h), h

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0])[0], batch[1])


class NoForward(Plain):
    """Everything happens in `training_step`."""

    forward = LightningModule.forward

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch[0]), batch[1])


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


class Triples(Plain):
    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]), batch[1])


def triple_loader():
    x, y = examples().tensors
    return DataLoader(TensorDataset(x, y, y), batch_size=3)


class TwoLoaders(Plain):
    def training_step(self, batch, batch_idx):
        if isinstance(batch, dict):
            batch = batch["first"]
        return cross_entropy(self(batch[0]), batch[1])


class Complex(Plain):
    def forward(self, x):
        return torch.complex(self.net(x), self.net(x))

    def training_step(self, batch, batch_idx):
        return self(batch[0]).abs().mean()


class Noisy(Plain):
    """Draws random numbers in evaluation too."""

    def forward(self, x):
        return self.net(x + torch.randn_like(x))


REFUSALS = {
    "more examples than there are": (
        Plain,
        lambda: NTKMonitor(13),
        "hold 12 examples, fewer than the 13 asked for. Ask for at most 12",
        {},
    ),
    "a memory budget nothing fits into": (
        Plain,
        lambda: NTKMonitor(4, options=NTKOptions(memory_budget="10B")),
        "MemoryBudgetError.*the budget is .*Raise `memory_budget`",
        {},
    ),
    "a memory budget for Jacobians": (
        Plain,
        lambda: JacobianMonitor(4, memory_budget=10),
        "MemoryBudgetError.*Raise `memory_budget`",
        {},
    ),
    "derivatives by tokens": (
        Tokens,
        lambda: JacobianMonitor(4),
        "torch.int64.*pass them as the inputs and an `output_fn`",
        {"train": token_loader},
    ),
    "two results": (
        TwoResults,
        lambda: NTKMonitor(4),
        re.escape("`output_fn=lambda model, x: model(x)[0]`"),
        {},
    ),
    "no forward": (
        NoForward,
        lambda: JacobianMonitor(4),
        re.escape("`output_fn=lambda module, x: module.net(x)`"),
        {},
    ),
    "complex outputs": (Complex, lambda: NTKMonitor(4), "real and imaginary parts", {}),
    "random outputs": (Noisy, lambda: NTKMonitor(4), "draws random numbers", {}),
    "loaders in a dict": (
        TwoLoaders,
        lambda: NTKMonitor(4),
        r"Build the probe yourself: Probe\(inputs, targets\)",
        {"train": lambda: {"first": loader(), "second": loader(6)}},
    ),
    "a combined loader": (
        TwoLoaders,
        lambda: JacobianMonitor(4),
        r"Build the probe yourself: Probe\(inputs, targets\)",
        {"train": lambda: CombinedLoader({"first": loader(), "second": loader(6)})},
    ),
    "batches of three": (
        Triples,
        lambda: NTKMonitor(4),
        r"expected \(x, y\).*Build the probe yourself",
        {"train": triple_loader},
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_at_once_with_a_way_out(case):
    """Modes 20 and 29 among them."""
    model, monitor, what, settings = REFUSALS[case]
    loaders = {}
    if "train" in settings:
        torch.manual_seed(1)
        loaders["train"] = settings["train"]()
    refused(model, monitor, what, **loaders)


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal_raises_if_asked_for(case):
    model, make, _, settings = REFUSALS[case]
    monitor = make()
    monitor.failures.on_error = "raise"
    kinds = (MemoryBudgetError, ProbeError, UnsupportedModelError)
    with pytest.raises(kinds):
        fit(model(), [monitor], **{k: v() for k, v in settings.items()})


def test_missing_file_is_found_before_any_training(tmp_path):
    with pytest.raises(ProbeError, match=r"there is no file 'nowhere.pt'"):
        NTKMonitor("nowhere.pt")
    with pytest.raises(ProbeError, match="there is no file"):
        JacobianMonitor(tmp_path / "nowhere.pt")


@pytest.mark.parametrize(
    "kind",
    [
        *(NTKMonitor, ParameterDriftMonitor, JacobianMonitor),
        *(PredictionMonitor, SignalMonitor, FeatureMonitor, LinearizationMonitor),
    ],
)
def test_two_monitors_of_one_name_are_refused_before_training(kind):
    name = kind().instrument.name
    way_out = re.escape(f'{kind.__name__}(name="{name}_test")')
    with pytest.raises(ValueError, match=f"writes to the tags {name}/….*{way_out}"):
        fit(Plain(), [kind(every=2), kind(every=3)])
    probe = {} if kind is ParameterDriftMonitor else {"probe": 4}
    other = kind(every=3, name=f"{name}_test", history=False, **probe)
    assert other.kept.target is False
    run = fit(Plain(), [kind(every=2, **probe), other], max_steps=3)
    groups = {tag.split("/")[0] for _, row in run.recorder.rows for tag in row}
    assert {name, f"{name}_test"} <= groups


@pytest.mark.parametrize(
    ("kind", "options"),
    [(NTKMonitor, NTKOptions), (LinearizationMonitor, LinearizationOptions)],
)
def test_keywords_go_before_options_and_leave_the_others_alone(kind, options):
    given = options(mode="train", name="one", history="there")
    monitor = kind(options=given, name="two", history=False)
    assert monitor.instrument.options == options(
        mode="train", name="two", history=False
    )
    assert (kind(options=given).instrument.name, given.name) == ("one", "one")
    with pytest.raises(ValueError, match="name='a b' becomes part of tags"):
        kind(name="a b")


def test_a_monitor_says_what_it_measures_and_when():
    assert repr(NTKMonitor()) == "NTKMonitor(name='ntk', probe=64, every='1 epochs')"
    monitor = JacobianMonitor(Probe(torch.ones(3, 2)), "5 per decade", name="j")
    assert repr(monitor) == "JacobianMonitor(name='j', probe=3, every='5 per decade')"
    text = "ParameterDriftMonitor(name='params', every='2 steps')"
    assert repr(ParameterDriftMonitor(2)) == text


# What the messages say works, works -------------------------------------------------


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


def test_what_fails_for_one_reason_is_explained_once():
    def monitors():
        return [NTKMonitor(4, 100), ParameterDriftMonitor(100), SignalMonitor(4, 100)]

    used = monitors()
    for _ in range(2):  # each run tells it anew
        with pytest.warns(UserWarning, match="Monitor") as caught:
            fit(NoForward(), used)
        texts = [
            str(w.message) for w in caught if "the measurement of" in str(w.message)
        ]
        assert len(texts) == 2
        assert "NoForward does not define `forward`" in texts[0]
        assert texts[1] == (
            "SignalMonitor: the measurement of step 0 failed (for the same reason as "
            "NTKMonitor's). The monitor is off for the rest of this run; training goes "
            "on."
        )
    flaky = [NTKMonitor(4, 1, output_fn=Flaky(1)), SignalMonitor(4, 1)]
    flaky[1].instrument.output_fn = Flaky(2)
    with pytest.warns(UserWarning, match="not today") as caught:
        fit(Plain(), flaky, max_steps=3)
    texts = [str(w.message) for w in caught if "the measurement of" in str(w.message)]
    assert [("ArithmeticError: not today" in text) for text in texts] == [True, True]


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


# Failing now and then -----------------------------------------------------------------


class Flaky:
    """An `output_fn` that fails at the given updates."""

    def __init__(self, *steps):
        self.steps = steps

    def __call__(self, module, x):
        if module.trainer.global_step in self.steps:
            raise ArithmeticError("not today")
        return module(x)


@pytest.mark.parametrize("kind", [NTKMonitor, JacobianMonitor])
def test_three_failures_in_a_row_turn_a_monitor_off(kind):
    """Mode 20."""
    flaky = Flaky(1, 2, 4, 5, 6)
    run, texts = warned(Plain, lambda: kind(4, 1, output_fn=flaky))
    assert [*run.recorder.measured()] == [0, 3]
    steps = [int(re.search(r"step (\d+)", text)[1]) for text in texts]
    assert steps == [1, 2, 4, 5, 6]
    assert all("ArithmeticError: not today" in text for text in texts)
    assert [("tried as planned" in t, "off for the" in t) for t in texts] == [
        *([(True, False)] * 4),
        (False, True),
    ]


def test_failure_at_the_start_moves_the_reference():
    """The first kernel that could be measured is the reference."""
    run, (text,) = warned(Plain, lambda: NTKMonitor(4, 2, output_fn=Flaky(0)))
    assert "step 0" in text
    measured = run.recorder.measured()
    assert [*measured] == [2, 4, 6, 8]
    assert measured[2]["ntk/relative_change"] == 0.0
    assert measured[4]["ntk/relative_change"] > 0.0


def test_failure_in_between_leaves_references_alone():
    seeded()
    whole = fit(Plain(), [NTKMonitor(4, 2, on_error="raise")]).recorder.measured()
    run, _ = warned(Plain, lambda: NTKMonitor(4, 2, output_fn=Flaky(4)))
    measured = run.recorder.measured()
    assert [*measured] == [0, 2, 6, 8]
    same(measured[2], whole[2])
    same(measured[8], whole[8])
    assert measured[6]["ntk/relative_change"] == whole[6]["ntk/relative_change"]


def test_failure_raises_if_asked_for():
    """`on_error="raise"`: Lightning sees the exception, the module is as it was."""
    model = Plain()
    monitor = NTKMonitor(4, 2, output_fn=Flaky(2), on_error="raise")
    with pytest.raises(ArithmeticError, match="not today"):
        fit(model, [monitor])
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert [step for step, _ in monitor.history] == [0]


def test_interrupts_are_not_swallowed():
    """Only exceptions of measurements are; the keyboard still stops the run."""

    def interrupted(module, x):
        raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(Plain(), [NTKMonitor(4, 1, output_fn=interrupted)])


# Numbers that are not ----------------------------------------------------------------


class Poison(Callback):
    """A training that diverges."""

    def __init__(self, value):
        self.value = value

    def on_train_batch_start(self, trainer, pl_module, *_):
        if trainer.global_step == 3:
            pl_module.net[0].weight.data.fill_(self.value)


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_weights_that_are_not_finite(value):
    """Mode 20: decompositions raise on NaN; curves show it, the run goes on."""
    monitors = [
        NTKMonitor(4, 2, on_error="raise"),
        ParameterDriftMonitor(2, on_error="raise"),
        JacobianMonitor(4, 2, on_error="raise"),
    ]
    seeded()
    run = fit(Plain(), [*monitors, Poison(value)])
    measured = run.recorder.measured()
    assert [*measured] == [0, 2, 4, 6, 8]
    assert {len(row) for row in measured.values()} == {len(measured[0])}
    for tag in ("ntk/trace", "ntk/relative_change", "ntk/condition_number"):
        assert math.isfinite(measured[2][tag])
        assert not math.isfinite(measured[4][tag]), tag
    assert not math.isfinite(measured[4]["params/displacement"])
    assert not math.isfinite(measured[4]["jacobian/singular_value_max"])
    seeded()
    same(run.trace(), fit(Plain(), [Poison(value)]).trace())


@pytest.mark.filterwarnings("ignore:.*invalid value.*:RuntimeWarning")
def test_weights_that_are_not_finite_in_tensorboard(tmp_path):
    """Mode 12: histograms of NaN alone raise in TensorBoard."""
    from lightning.pytorch.loggers import TensorBoardLogger

    monitors = [NTKMonitor(4, 2, on_error="raise"), JacobianMonitor(4, 2)]
    run = fit(
        Plain(), [*monitors, Poison(math.nan)], logger=TensorBoardLogger(tmp_path)
    )
    assert run.trainer.global_step == 8
    assert [step for step, _ in monitors[0].history] == [0, 2, 4, 6, 8]


def test_model_that_starts_at_zero():
    class Zero(Plain):
        def __init__(self):
            super().__init__()
            for parameter in self.parameters():
                nn.init.zeros_(parameter)

    monitors = [
        NTKMonitor(4, 2, on_error="raise"),
        ParameterDriftMonitor(2, on_error="raise"),
        JacobianMonitor(4, 2, on_error="raise"),
    ]
    assert [*fit(Zero(), monitors).recorder.measured()] == [0, 2, 4, 6, 8]


# Models that are not ready -----------------------------------------------------------


class Lazy(Plain):
    """Without shapes until the first batch."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.Linear(4, 2)))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("kind", [NTKMonitor, JacobianMonitor])
def test_lazy_modules_are_refused(kind):
    """Mode 31."""
    refused(Lazy, lambda: kind(4, 2), "'net.0.weight' is lazy.*Run one batch")


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_modules_drift_from_their_first_shape_on():
    run, texts = warned(Lazy, lambda: ParameterDriftMonitor(2))
    assert len(texts) == 1
    assert "uninitialized" in texts[0].lower() or "lazy" in texts[0]
    measured = run.recorder.measured()
    assert [*measured] == [2, 4, 6, 8]
    assert measured[2]["params/displacement"] == 0.0


def test_nothing_to_train():
    class Frozen(Plain):
        def __init__(self):
            super().__init__()
            self.requires_grad_(False)
            self.free = nn.Parameter(torch.zeros(()))

        def training_step(self, batch, batch_idx):
            return self.free * mse_loss(self(batch[0]), torch.zeros(3, 2))

    chosen = NTKMonitor(4, 2, parameters="net", on_error="raise")
    with pytest.raises(ValueError, match="no parameter with requires_grad"):
        fit(Frozen(), [chosen])
    by_hand = NTKMonitor(
        4, 2, parameters=lambda name, p: name.startswith("net"), on_error="raise"
    )
    assert [*fit(Frozen(), [by_hand]).recorder.measured()] == [0, 2, 4, 6, 8]


# Arguments ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "what"),
    [
        (lambda: NTKMonitor(metrics=["trase"]), ValueError, "trase.*expected some of"),
        (lambda: NTKMonitor(every="sometimes"), ValueError, "'3 epochs', '100 steps'"),
        (lambda: NTKMonitor(every=0), ValueError, "at least 1"),
        (lambda: NTKMonitor(0), ValueError, "at least 1 example, got 0"),
        (lambda: NTKMonitor(-3), ValueError, "at least 1 example, got -3"),
        (lambda: NTKMonitor(True), ValueError, "probe is a bool"),
        (lambda: JacobianMonitor([1.0, 2.0]), ValueError, "probe is a list"),
        (lambda: NTKMonitor(None), ValueError, "probe is a NoneType"),
        (
            lambda: NTKMonitor(outputs="all"),
            ValueError,
            "outputs='all'.*auto, matrix-free, full",
        ),
        (
            lambda: NTKMonitor(by="layer"),
            ValueError,
            "by='layer'.*'module', 'parameter'",
        ),
        (lambda: NTKOptions(route="fast"), ValueError, "route='fast'.*auto, "),
        (lambda: NTKOptions(mode="test"), ValueError, "mode='test'.*eval, train"),
        (lambda: NTKOptions(memory_budget="2 pounds"), ValueError, "not understood"),
        (lambda: NTKOptions(name="my kernel"), ValueError, "part of tags"),
        (lambda: JacobianMonitor(mode="test"), ValueError, "mode='test'.*eval, train"),
        (lambda: JacobianMonitor(memory_budget=0), ValueError, "must be positive"),
        (lambda: SignalMonitor(layers="["), ValueError, "no regular expression"),
        (lambda: SignalMonitor(activation="tan"), ValueError, "expected one of relu"),
        (lambda: SignalMonitor(gradient_of="x"), ValueError, "expected one of outputs"),
        (lambda: ParameterDriftMonitor(on_error="ignore"), ValueError, "'warn' or"),
        (lambda: NTKMonitor(torch.zeros(0, 3)), ProbeError, "no example"),
        (lambda: NTKMonitor(torch.tensor([[math.nan]])), ProbeError, "inputs hold NaN"),
        (lambda: NTKMonitor(torch.tensor(1.0)), ProbeError, "leading dimension"),
        (
            lambda: Probe(torch.zeros(2, 3), torch.zeros(3)),
            ProbeError,
            "2 inputs but 3 targets",
        ),
    ],
)
def test_arguments_are_checked_before_any_training(make, error, what):
    with pytest.raises(error, match=what):
        make()


def test_pattern_that_takes_nothing_names_what_there_is():
    monitor = NTKMonitor(4, parameters="conv", on_error="raise")
    with pytest.raises(ValueError, match=r"'conv'.*net\.0\.weight"):
        fit(Plain(), [monitor])
    monitor = NTKMonitor(4, by={"conv": "conv"}, on_error="raise")
    with pytest.raises(ValueError, match=r"'conv'.*net\.0\.weight"):
        fit(Plain(), [monitor])


def test_exceptions_are_builtins_too():
    assert issubclass(ProbeError, ValueError)
    assert issubclass(ProbeMismatchError, ValueError)
    assert issubclass(UnsupportedModelError, RuntimeError)
    assert issubclass(MemoryBudgetError, MemoryError)

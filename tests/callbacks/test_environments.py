"""Monitors beside precision, averaged weights, compiled models and strategies."""

import re
import tomllib
import warnings
from pathlib import Path

import lightning.pytorch
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    WeightAveraging,
)
from monitored import (
    Plain,
    Validated,
    all_monitors,
    fit,
    loader,
    same,
    seeded,
    three_monitors,
)
from one_of_a_kind import quick
from torch import nn
from torch.nn.functional import cross_entropy

from ntk_callbacks import (
    JacobianMonitor,
    NTKMonitor,
    ParameterDriftMonitor,
    PredictionMonitor,
    SignalMonitor,
)

# Precision -----------------------------------------------------------------------


class Cast(Plain):
    """Takes whatever floating type the precision asks for."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        dtype = next(self.parameters()).dtype
        loss = cross_entropy(self(x.to(dtype)), y)
        self.log("loss", loss)
        return loss


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision(precision):
    """Mode 26: weights and probe of different types, eigenvalues of half precision."""

    def run(callbacks):
        seeded()
        return fit(Cast(), callbacks, precision=precision, max_epochs=1)

    monitored = run(three_monitors(2))
    same(monitored.trace(), run([]).trace())
    measured = monitored.recorder.measured()
    assert [*measured] == [0, 2, 4]
    values = {k: v for k, v in measured[4].items() if "velocity" not in k}
    assert all(torch.tensor(v).isfinite() for v in values.values())
    kernel = next(
        m.instrument.state_dict()["reference"]
        for m in monitored.trainer.callbacks
        if isinstance(m, NTKMonitor)
    )
    assert kernel.dtype == (torch.float64 if "64" in precision else torch.float32)


def test_anomaly_detection_finds_nothing_in_measurements():
    """It would tell of passes that are meant to fail."""
    runs = []
    for detect in (False, True):
        seeded()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run = fit(Plain(), all_monitors(every=3), detect_anomaly=detect)
        assert not [w for w in caught if "Error detected in" in str(w.message)]
        runs.append(run.recorder.measured())
    same(*runs)


def test_mixed_precision_kernel_is_that_of_the_weights():
    """Mode 26: no autocast inside; the kernel is exact to float32."""
    measured = []
    for precision in ("bf16-mixed", "32-true"):
        seeded()
        run = fit(Cast(), [NTKMonitor(4, 2, on_error="raise")], precision=precision)
        measured.append(run.recorder.measured()[0])
    same(*measured)


# Averaged weights ----------------------------------------------------------------


class Norms(Callback):
    """What the raw weights are after each update."""

    def __init__(self):
        self.raw = {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        parameters = [p.detach().flatten() for p in pl_module.parameters()]
        self.raw[trainer.global_step] = torch.cat(parameters).double()


@pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])
@pytest.mark.parametrize("schedule", [3, "epoch", 100])
@pytest.mark.parametrize("stops", [False, True], ids=["runs out", "stopped early"])
def test_raw_weights_are_measured_beside_averaged_ones(first, schedule, stops):
    """Mode 27: EMA weights are swapped in around validation and at the end."""
    average = EMAWeightAveraging(decay=0.5)
    monitor = ParameterDriftMonitor(schedule, on_error="raise")
    norms = Norms()
    order = [average, monitor] if first else [monitor, average]
    if stops:
        order.append(EarlyStopping("loss", mode="max", patience=1, min_delta=100.0))
    start = {}

    class Start(Callback):
        def on_train_start(self, trainer, pl_module):
            parameters = [p.detach().flatten() for p in pl_module.parameters()]
            start[0] = torch.cat(parameters).double()

    seeded()
    run = fit(
        Validated(),
        [norms, Start(), *order],
        val=loader(3),
        max_epochs=9 if stops else 2,
    )
    measured = run.recorder.measured()
    between = {3: [3, 6], "epoch": [4], 100: []}[schedule]
    # Where a stop is only known after the average was written, no raw weights are left.
    gone = stops and first and schedule != "epoch"
    assert [*measured] == [0, *between, *([] if gone else [8])]
    for step in [*measured][1:]:
        away = norms.raw[step] - start[0]
        expected = (away.norm() / start[0].norm()).item()
        assert measured[step]["params/displacement"] == pytest.approx(expected)
    final = torch.cat([p.detach().flatten() for p in run.model.parameters()]).double()
    assert not torch.allclose(final, norms.raw[8])  # the averages did come in


def test_weight_averaging_copies_the_module_with_monitors_present():
    """Mode 22: AveragedModel deep-copies the module in `setup`."""
    seeded()
    run = fit(Plain(), [*three_monitors(3), WeightAveraging()])
    assert [*run.recorder.measured()] == [0, 3, 6, 8]
    seeded()
    same(run.model.state_dict(), fit(Plain(), [WeightAveraging()]).model.state_dict())


def test_checkpoints_hold_raw_weights_and_our_state(tmp_path):
    """ModelCheckpoint runs last, so that it saves what was measured at its step."""
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_epochs=1)
    monitor = ParameterDriftMonitor("epoch", on_error="raise")
    fit(Validated(), [saver, monitor], val=loader(3), enable_checkpointing=True)
    paths = sorted(tmp_path.glob("*.ckpt"))
    states = [torch.load(p, weights_only=True)["callbacks"] for p in paths]
    assert [s[monitor.state_key]["measured"] for s in states] == [4, 8]


# Compilation ---------------------------------------------------------------------


class Silent(Plain):
    """Lightning's `self.log` does not compile."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return cross_entropy(self(x), y)


def compiled(how, backend):
    model = Silent(
        nn.Sequential(
            *(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh()),
            *(nn.Dropout(0.2), nn.Linear(4, 2)),
        )
    )
    if how == "inner":
        model.net = torch.compile(model.net, backend=backend)
        return model
    return torch.compile(model, backend=backend)


@pytest.mark.parametrize("backend", quick(["eager", "aot_eager"], "eager"))
@pytest.mark.parametrize("how", ["inner", "module"])
def test_compiled_models(how, backend):
    """Mode 30: same training, no more compilations, names without wrappers."""
    from torch._dynamo.utils import counters

    def run(callbacks):
        torch._dynamo.reset()
        counters.clear()
        seeded()
        done = fit(compiled(how, backend), callbacks, train=loader(12, 4))
        counted = {name: dict(found) for name, found in counters.items()}
        return done, counted

    monitors = [
        NTKMonitor(4, 1, by="module", on_error="raise"),
        ParameterDriftMonitor(1, on_error="raise"),
        JacobianMonitor(4, 1, on_error="raise"),
        PredictionMonitor(4, 1, on_error="raise"),
        SignalMonitor(4, 1, per_layer=True, on_error="raise"),
    ]
    monitored, with_monitors = run(monitors)
    bare, without = run([])
    assert with_monitors["stats"]["unique_graphs"] > 0
    assert with_monitors["stats"] == without["stats"]
    assert with_monitors.get("frames") == without.get("frames")
    assert monitored.trainer.global_step == 6
    weights, expected = (
        {**r.trainer.lightning_module.state_dict()} for r in (monitored, bare)
    )
    same(weights, expected)
    same(monitored.generators, bare.generators)
    measured = monitored.recorder.measured()
    assert [*measured] == [0, 1, 2, 3, 4, 5, 6]
    tags = {tag for row in measured.values() for tag in row}
    assert {
        "params_tensors/displacement/net.0.weight",
        "ntk_modules/trace/net.4",
    } <= tags
    assert not any("_orig_mod" in tag for tag in tags)


def test_compiled_and_eager_models_measure_the_same():
    rows = []
    for how in ("inner", None):
        torch._dynamo.reset()
        seeded()
        model = compiled("inner", "eager")
        if how is None:
            model.net = model.net._orig_mod
        run = fit(model, three_monitors(3), max_steps=3)
        rows.append(run.recorder.measured())
    assert [*rows[0]] == [0, 3]
    same(rows[0][0], rows[1][0])


# Strategies ------------------------------------------------------------------------


def test_sharded_strategies_are_refused():
    """Mode 32: refused before anything touches a shard; training goes on."""

    class FSDPStrategy(lightning.pytorch.strategies.SingleDeviceStrategy):
        """Only the name is that of the sharding one."""

    monitors = [NTKMonitor(4, 1), ParameterDriftMonitor(100), JacobianMonitor(4, 1)]
    seeded()
    why, same_why = "sharded by FSDPStrategy", "for the same reason as NTKMonitor's"
    with pytest.warns(UserWarning, match=f"{why}|{same_why}") as caught:
        run = fit(Plain(), monitors, strategy=FSDPStrategy(torch.device("cpu")))
    texts = [str(w.message) for w in caught]
    (told,) = (text for text in texts if why in text)
    assert "Train with DDP or on one device" in told
    assert sum(same_why in text for text in texts) == 2
    assert not run.recorder.measured()
    seeded()
    same(run.model.state_dict(), fit(Plain()).model.state_dict())


# What comes along ------------------------------------------------------------------


def test_installing_the_package_changes_no_other():
    """Mode 40: rich turns the user's progress bar into another one, and a torchvision
    that does not fit torch breaks Lightning; neither is required, only offered."""
    path = Path(__file__).parent.parent.parent / "pyproject.toml"
    listed = tomllib.loads(path.read_text())["project"]["dependencies"]
    required = {re.match(r"[a-z-]+", text)[0] for text in listed}
    assert required == {
        *("torch", "lightning", "torchmetrics", "tensorboard"),
        *("hydra-core", "jaxtyping", "safetensors"),
    }

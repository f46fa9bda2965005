"""Monitors in all that a Trainer is made of: namespaces, loggers, precision, copies."""

import csv
import random
import re
import tomllib
import warnings
from pathlib import Path

import lightning.pytorch
import numpy as np
import pytest
import pytorch_lightning
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from monitored import (
    PREFIXES,
    Delicate,
    OtherPlain,
    Plain,
    Recorder,
    Validated,
    all_monitors,
    fit,
    loader,
    same,
    seeded,
    three_monitors,
)
from one_of_a_kind import quick
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn.functional import cross_entropy

from ntk_callbacks import (
    JacobianMonitor,
    NTKMonitor,
    ParameterDriftMonitor,
    PredictionMonitor,
    SignalMonitor,
)

# Two names of Lightning ----------------------------------------------------------

NAMESPACES = {
    "lightning.pytorch": (lightning.pytorch.Trainer, Plain),
    "pytorch_lightning": (pytorch_lightning.Trainer, OtherPlain),
}


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("index", range(3), ids=["ntk", "drift", "jacobian"])
def test_single_monitor_in_either_namespace(namespace, index):
    """Mode 33: given alone or in a list, to the Trainer of either package."""
    kind, model = NAMESPACES[namespace]
    alone = fit(model(), three_monitors(3)[index], kind=kind)
    assert [*alone.recorder.measured()] == [0, 3, 6, 8]
    listed = fit(model(), [three_monitors(3)[index]], kind=kind)
    assert [*listed.recorder.measured()] == [0, 3, 6, 8]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended")
@pytest.mark.parametrize("namespace", NAMESPACES)
def test_resume_in_either_namespace(namespace):
    """Mode 33: the state is saved and found again."""
    kind, model = NAMESPACES[namespace]
    short = fit(model(), three_monitors(3), kind=kind, max_steps=6)
    short.trainer.save_checkpoint("6.ckpt")
    recorder = Recorder()
    fit(
        model(),
        three_monitors(3),
        kind=kind,
        max_steps=12,
        ckpt_path="6.ckpt",
        logger=recorder,
    )
    assert [*recorder.measured()] == [9, 12]
    assert recorder.measured()[9]["params/displacement"] > 0


def test_both_namespaces_log_the_same_numbers():
    runs = []
    for kind, model in NAMESPACES.values():
        seeded()
        runs.append(fit(model(), three_monitors(3), kind=kind).recorder.measured())
    same(*runs)


def test_monitors_from_configure_callbacks():
    class Own(Plain):
        def configure_callbacks(self):
            return three_monitors(3)

    assert [*fit(Own()).recorder.measured()] == [0, 3, 6, 8]


# Loggers ---------------------------------------------------------------------------


class Refusing(Recorder):
    """A logger whose service is down: it takes losses, nothing else."""

    @property
    def name(self):
        return "refusing"

    def log_metrics(self, metrics, step=None):
        if "loss" not in metrics:
            raise ConnectionError("the service is down")
        super().log_metrics(metrics, step)


def test_without_a_logger():
    """Mode 12: nothing to write to; measurements are still taken."""
    monitors = three_monitors(3)
    fit(Plain(), monitors, logger=False)
    for monitor in monitors:
        assert [step for step, _ in monitor.history] == [0, 3, 6, 8]


def test_tensorboard(tmp_path):
    """Modes 12 and 37: scalars, a histogram, an image; no run folders of their own."""
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    monitors = three_monitors(3)
    fit(Plain(), monitors, logger=logger)
    events = [path for path in tmp_path.rglob("*") if "tfevents" in path.name]
    assert len(events) == 1
    read = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0})
    read.Reload()
    tags = read.Tags()
    found = {
        (event.step, tag): event.value
        for tag in tags["scalars"]
        for event in read.Scalars(tag)
        if tag.split("/")[0]
        in ("ntk", "params", "params_tensors", "jacobian", "monitor")
        and not tag.startswith("monitor/seconds")
    }
    for monitor in monitors:
        for step, row in monitor.history:
            for tag, value in row.items():
                logged = found.pop((step, tag))
                assert logged == pytest.approx(value, rel=1e-6, nan_ok=True)
    assert not found
    drawn = {"ntk/eigenvalues_log10", "jacobian/singular_values_log10"}
    assert {*tags["histograms"]} == drawn
    assert {*tags["images"]} == {
        "ntk/kernel",
        "ntk/eigenvalues_log10_over_time",
        "jacobian/singular_values_log10_over_time",
    }
    assert [event.step for event in read.Images("ntk/kernel")] == [0, 3, 6, 8]


def test_csv(tmp_path):
    """Mode 12: a writer without images; all columns from the first measurement on."""
    logger = CSVLogger(tmp_path)
    fit(Plain(), three_monitors(3), logger=logger)
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open() as file:
        rows = [*csv.DictReader(file)]
    for tag in ("ntk/trace", "params/displacement", "jacobian/mean_square"):
        assert [int(row["step"]) for row in rows if row[tag]] == [0, 3, 6, 8]


def test_several_loggers(tmp_path):
    first, last = Recorder(), Recorder()
    loggers = [first, CSVLogger(tmp_path), TensorBoardLogger(tmp_path), last]
    fit(Plain(), three_monitors(3), logger=loggers)
    assert [*first.measured()] == [0, 3, 6, 8]
    same(first.rows, last.rows)


def test_logger_that_raises():
    """The others get everything, the user is told once, training is the same."""
    refusing, after = Refusing(), Recorder()
    monitor = NTKMonitor(4, 3)
    seeded()
    with pytest.warns(UserWarning, match="the service is down") as caught:
        run = fit(Plain(), [monitor], logger=[refusing, after])
    texts = [str(w.message) for w in caught if "service is down" in str(w.message)]
    assert len(texts) == 1
    assert "Refusing did not take the measurement of step 0" in texts[0]
    assert "Other loggers got it" in texts[0]
    assert [*after.measured()] == [step for step, _ in monitor.history] == [0, 3, 6, 8]
    assert not refusing.measured()
    seeded()
    same(run.model.state_dict(), fit(Plain()).model.state_dict())


def test_logger_that_draws_random_numbers(tmp_path):
    """As those that wait a random time before they try again."""

    class Retrying(Recorder):
        @property
        def experiment(self):
            return self

        def log_metrics(self, metrics, step):
            if any(tag.startswith(PREFIXES) for tag in metrics):
                self.wait()
            super().log_metrics(metrics, step)

        def wait(self, *_, **__):
            random.random()
            np.random.rand()  # noqa: NPY002
            torch.rand(3)

        add_histogram = add_image = add_text = add_custom_scalars = wait

    seeded()
    logger = Retrying()
    monitors = [NTKMonitor(4, 2, on_error="raise", history=str(tmp_path))]
    run = fit(Delicate(), monitors, logger=logger, val=loader(3))
    assert [*logger.measured()] == [0, 2, 4, 6, 8]
    seeded()
    bare = fit(Delicate(), val=loader(3))
    same(run.model.state_dict(), bare.model.state_dict())
    same(run.generators, bare.generators)


def test_logger_that_raises_is_an_error_if_asked_for():
    monitor = ParameterDriftMonitor(3, on_error="raise")
    with pytest.raises(ConnectionError, match="the service is down"):
        fit(Plain(), [monitor], logger=[Refusing()])


def test_tags_are_legal_for_every_logger():
    """Mode 37: MLflow strips other characters; TensorBoard groups by the first part."""

    class Odd(nn.ModuleDict):
        def forward(self, x):
            return self["a b:c"](x)

    model = Plain(nn.Sequential(Odd({"a b:c": nn.Linear(3, 2)})))
    monitors = [
        NTKMonitor(4, 3, by="parameter", on_error="raise"),
        ParameterDriftMonitor(3, on_error="raise"),
        JacobianMonitor(4, 3, on_error="raise"),
        PredictionMonitor(4, 3, per_class=True, on_error="raise"),
        SignalMonitor(4, 3, per_layer=True, on_error="raise"),
    ]
    measured = fit(model, monitors).recorder.measured()
    tags = {tag for row in measured.values() for tag in row}
    assert "ntk_modules/trace/net.0.a_b_c.weight" in tags
    assert "params_tensors/displacement/net.0.a_b_c.bias" in tags
    assert all(re.fullmatch(r"[A-Za-z0-9_/.-]+", tag) for tag in tags)
    groups = {tag.split("/")[0] for tag in tags}
    assert groups == {
        *("ntk", "ntk_modules", "params", "params_tensors", "jacobian"),
        *("prediction", "prediction_classes", "signal", "signal_layers"),
    }


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

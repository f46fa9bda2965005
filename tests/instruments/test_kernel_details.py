"""What a kernel tells on demand, against formulas on paper and loops in NumPy."""

import copy
import math
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ntk_callbacks import NTKOptions, Probe
from ntk_callbacks.instruments.features import FeatureInstrument
from ntk_callbacks.instruments.kernel import KernelInstrument
from ntk_callbacks.instruments.kernel_details import DETAILS, OF_PARTS
from ntk_callbacks.instruments.kernel_view import METRICS, KernelView

N, D = 12, 10
RNG = np.random.default_rng(3)
X = RNG.standard_normal((N, D))
CLASSES = np.array([2, 0, 1, 0, 2, 2, 1, 0, 2, 1, 0, 5])
PROBE = Probe(torch.tensor(X), torch.tensor(CLASSES))
CLOSE = {"rel": 1e-9, "abs": 1e-12}


def product(w, v):
    """f(x) = v · W x with one output."""
    net = nn.Sequential(nn.Linear(D, 4, bias=False), nn.Linear(4, 1, bias=False))
    set_weights(net.double(), w, v)
    return net


def set_weights(net, w, v):
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor(w))
        net[1].weight.copy_(torch.tensor(v)[None])


def product_parts(w, v, x=X):
    """∂f/∂W = v xᵀ and ∂f/∂v = W x."""
    return {"0": (v @ v) * (x @ x.T), "1": (x @ w.T) @ (w @ x.T)}


def two_points():
    rng = np.random.default_rng(1)
    return [(rng.standard_normal((4, D)), rng.standard_normal(4)) for _ in range(2)]


def drifted(metrics, by=None, probe=PROBE):
    """Scalars and matrices at the first and at the second of two points."""
    first, second = two_points()
    net = product(*first)
    instrument = KernelInstrument(metrics=metrics, by=by)
    instrument.start(probe)
    before = instrument.measure(net, 0)
    set_weights(net, *second)
    return before, instrument.measure(net, 7)


def kernels():
    return [sum(product_parts(*point).values()) for point in two_points()]


def test_scale_and_shape_of_drift():
    start, now = kernels()
    before, after = drifted(["scale_change", "shape_change", "relative_change"])
    assert [*before.scalars.values()][:3] == [0, 0, 0]
    a = np.trace(start @ now) / np.trace(start @ start)
    shape = np.linalg.norm(now - a * start) / np.linalg.norm(start)
    assert after.scalars["ntk/scale_change"] == pytest.approx(a - 1, **CLOSE)
    assert after.scalars["ntk/shape_change"] == pytest.approx(shape, **CLOSE)
    squares = [after.scalars[f"ntk/{name}_change"] ** 2 for name in ("scale", "shape")]
    whole = after.scalars["ntk/relative_change"] ** 2
    assert sum(squares) == pytest.approx(whole, **CLOSE)


def test_noise_floor_from_two_halves():
    changes = []
    for rows in (range(0, N, 2), range(1, N, 2)):
        start, now = (kernel[np.ix_(rows, rows)] for kernel in kernels())
        changes.append(np.linalg.norm(now - start) / np.linalg.norm(start))
    before, after = drifted(["drift_noise_floor"])
    assert before.scalars["ntk/drift_noise_floor"] == 0
    expected = abs(changes[0] - changes[1]) / 2
    assert after.scalars["ntk/drift_noise_floor"] == pytest.approx(expected, **CLOSE)
    assert expected > 0.01


def test_noise_floor_is_the_scatter_between_probes():
    """½ |d₁ − d₂| squared is on average the variance of d over probes."""
    rng = np.random.default_rng(2)
    first, second = two_points()
    floors, changes = [], []
    for _ in range(300):
        x = rng.standard_normal((40, D))
        start, now = (
            torch.tensor(sum(product_parts(*point, x).values()))
            for point in (first, second)
        )
        view = KernelView(now, start, None, 1, None)
        floors.append(float(DETAILS["drift_noise_floor"](view)))
        changes.append(float((now - start).norm() / start.norm()))
    # 300 draws know a standard deviation to 4 %, and halves are small probes.
    spread = np.std(changes)
    assert np.mean(np.square(floors)) ** 0.5 == pytest.approx(spread, rel=0.25)


def test_top_eigenspace_against_the_start():
    start, now = (np.linalg.eigh(kernel)[1][:, -8:] for kernel in kernels())
    cosines = np.linalg.svd(start.T @ now, compute_uv=False)
    before, after = drifted(["subspace_angle", "subspace_overlap"])
    assert before.scalars["ntk/subspace_angle"] == 0
    assert before.scalars["ntk/subspace_overlap"] == pytest.approx(1, rel=1e-12)
    found = after.scalars["ntk/subspace_angle"], after.scalars["ntk/subspace_overlap"]
    assert found[0] == pytest.approx(math.acos(cosines[-1]), rel=1e-8)
    assert found[1] == pytest.approx((cosines**2).mean(), rel=1e-8)
    assert found[0] > 0.1


def test_classes():
    names = ["class_blocks", "class_ratio"]
    _, after = drifted(names)
    kernel = kernels()[1]
    pairs = [(i, j) for i in range(N) for j in range(N) if i != j]
    blocks = np.full((4, 4), np.nan)
    for a, one in enumerate([0, 1, 2, 5]):
        for b, other in enumerate([0, 1, 2, 5]):
            wanted = (one, other)
            entries = [
                kernel[i, j] for i, j in pairs if (CLASSES[i], CLASSES[j]) == wanted
            ]
            blocks[a, b] = np.mean(entries) if entries else np.nan
    found = after.matrices["ntk/class_blocks"].numpy()
    assert found == pytest.approx(blocks, nan_ok=True, **CLOSE)
    within = [kernel[i, j] for i, j in pairs if CLASSES[i] == CLASSES[j]]
    between = [kernel[i, j] for i, j in pairs if CLASSES[i] != CLASSES[j]]
    ratio = np.mean(within) / np.mean(between)
    assert after.scalars["ntk/class_ratio"] == pytest.approx(ratio, **CLOSE)
    with pytest.warns(UserWarning, match="class_blocks .* class_ratio"):
        _, real = drifted(names, probe=Probe(torch.tensor(X), torch.ones(N)))
    assert not {"ntk/class_ratio"} & real.scalars.keys()
    assert [*real.matrices] == ["ntk/kernel"]


@pytest.mark.parametrize("by", ["module", {"0": r"^0", "1": r"^1"}])
def test_shares_of_parts(by):
    then, now = (product_parts(*point) for point in two_points())
    before, after = drifted(["trace_share", "drift_share"], by)
    assert np.isnan(before.scalars["ntk_modules/drift_share/0"])
    whole = sum(now.values())
    drift = whole - sum(then.values())
    for part in ("0", "1"):
        share = np.trace(now[part]) / np.trace(whole)
        found = after.scalars[f"ntk_modules/trace_share/{part}"]
        assert found == pytest.approx(share, **CLOSE)
        along = ((now[part] - then[part]) * drift).sum() / (drift**2).sum()
        found = after.scalars[f"ntk_modules/drift_share/{part}"]
        assert found == pytest.approx(along, **CLOSE)
    shares = [v for t, v in after.scalars.items() if "drift_share" in t]
    assert sum(shares) == pytest.approx(1, rel=1e-12)


def test_drift_of_a_layer_that_is_frozen_on_the_way():
    first, _ = two_points()
    net = product(*first)
    instrument = KernelInstrument(metrics=["drift_share"], by="module")
    instrument.start(PROBE)
    instrument.measure(net, 0)
    net[0].weight.requires_grad_(False)
    found = instrument.measure(net, 1).scalars
    # Nothing is left of its part, and nothing else has changed.
    assert found["ntk_modules/drift_share/0"] == pytest.approx(1)
    assert found["ntk_modules/drift_share/1"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_gap_between_batch_and_running_statistics(mode):
    net = nn.Sequential(nn.BatchNorm1d(D), nn.Linear(D, 2)).double()
    mean, variance = RNG.standard_normal(D), RNG.random(D) + 0.5
    net[0].running_mean.copy_(torch.tensor(mean))
    net[0].running_var.copy_(torch.tensor(variance))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    options = NTKOptions(mode=mode)
    instrument = KernelInstrument(
        metrics=["batchnorm_gap"], parameters="^1", options=options
    )
    instrument.start(PROBE)
    found = instrument.measure(net, 0).scalars["ntk/batchnorm_gap"]
    eps = net[0].eps
    running = (X - mean) / np.sqrt(variance + eps)
    batch = (X - X.mean(0)) / np.sqrt(X.var(0) + eps)
    evaluated, trained = running @ running.T + 1, batch @ batch.T + 1
    gap = np.linalg.norm(trained - evaluated) / np.linalg.norm(evaluated)
    assert found == pytest.approx(gap, **CLOSE)
    assert all(torch.equal(before[name], v) for name, v in net.state_dict().items())


def pseudo_ntk_by_loop(net, x):
    """Gradients of the sum of the outputs of each example of the whole batch."""
    sums = net(x).sum(1) / net(x).shape[1] ** 0.5
    rows = [
        torch.cat(
            [g.flatten() for g in torch.autograd.grad(s, [*net.parameters()], **KEPT)]
        )
        for s in sums
    ]
    j = torch.stack(rows)
    return (j @ j.T).numpy()


KEPT = {"retain_graph": True}


@pytest.mark.parametrize("outputs", ["full", "trace", "diagonal", "pseudo"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_gap_is_of_the_sum_of_the_outputs(mode, outputs):
    torch.manual_seed(0)
    net = classifier()
    with torch.no_grad():
        net[1].running_mean.normal_()
    twin = copy.deepcopy(net)
    evaluated = pseudo_ntk_by_loop(twin.eval(), PROBE.inputs)
    trained = pseudo_ntk_by_loop(twin.train(), PROBE.inputs)
    gap = np.linalg.norm(trained - evaluated) / np.linalg.norm(evaluated)
    instrument = KernelInstrument(
        metrics=["batchnorm_gap"], outputs=outputs, options=NTKOptions(mode=mode)
    )
    instrument.start(PROBE)
    found = instrument.measure(net, 0).scalars["ntk/batchnorm_gap"]
    assert found == pytest.approx(gap, **CLOSE)


def test_no_gap_without_running_statistics():
    for norm in (nn.LayerNorm(D), nn.BatchNorm1d(D, track_running_stats=False)):
        net = nn.Sequential(norm, nn.Linear(D, 2)).double()
        instrument = KernelInstrument(metrics=["batchnorm_gap"])
        instrument.start(PROBE)
        with pytest.warns(UserWarning, match="with running statistics"):
            scalars = instrument.measure(net, 0).scalars
        assert [*scalars] == ["monitor/audit_error"]


def classifier():
    return nn.Sequential(
        nn.Linear(D, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6)
    ).double()


def all_of(net, optimizer, by="module", probe=PROBE, **settings):
    instrument = KernelInstrument(metrics="all", by=by, **settings)
    instrument.optimizers = [optimizer]
    instrument.start(probe)
    return instrument, instrument.measure(net, 0)


def test_all_is_everything_and_the_default_is_not():
    net = classifier()
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    _, found = all_of(net, sgd)
    tags = {*found.scalars, *found.matrices}
    named = {tag.removeprefix("ntk/") for tag in tags if tag.startswith("ntk/")}
    several = {"residual_modes", *OF_PARTS}
    assert named == {*METRICS, *DETAILS, "kernel"} - several
    sides = {tag.rpartition("/")[0] for tag in tags if re.match("ntk_", tag)}
    assert sides == {
        *(f"ntk_modes/{what}" for what in ("residual", "decay_measured")),
        "ntk_modes/decay_predicted",
        *(f"ntk_modules/{what}" for what in ("trace", *OF_PARTS)),
    }
    assert all(re.fullmatch(r"[A-Za-z0-9_/.-]+", tag) for tag in tags)
    plain = KernelInstrument()
    plain.start(PROBE)
    usual = plain.measure(net, 0)
    assert len(usual.scalars) == 13  # 12 and monitor/audit_error
    same = {tag: found.scalars[tag] for tag in usual.scalars}
    assert same == pytest.approx(usual.scalars, nan_ok=True, rel=1e-8)


def test_all_without_parts_leaves_out_their_shares():
    net = classifier()
    _, found = all_of(net, torch.optim.SGD(net.parameters(), 0.1), by=None)
    assert not [tag for tag in found.scalars if tag.startswith("ntk_modules/")]


@pytest.mark.parametrize("outputs", ["trace", "pseudo", "diagonal"])
def test_what_needs_every_output_is_left_out_of_other_kernels(outputs):
    net = classifier()
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    _, found = all_of(net, sgd, outputs=outputs)
    missing = {"sharpness", "sharpness_limit", "sharpness_ratio", "off_diagonal_share"}
    assert not {f"ntk/{name}" for name in missing} & found.scalars.keys()
    assert not [tag for tag in found.scalars if "modes/" in tag]
    assert found.scalars["ntk/batchnorm_gap"] > 0


def test_a_model_that_has_diverged_gives_nan_and_no_error():
    net = classifier()
    adam = torch.optim.Adam(net.parameters())
    instrument, _ = all_of(net, adam)
    cross_entropy(net(PROBE.inputs), PROBE.targets).backward()
    adam.step()
    with torch.no_grad():
        net[0].weight[0, 0] = torch.nan
    found = instrument.measure(net, 1).scalars
    moving = ("scale_change", "subspace_angle", "batchnorm_gap", "sharpness")
    assert all(np.isnan(found[f"ntk/{name}"]) for name in moving)


def test_one_example_and_one_output():
    net = nn.Linear(D, 1).double()
    probe = Probe(torch.tensor(X[:1]), torch.ones(1, 1))
    options = NTKOptions(loss="half_mean")
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    _, found = all_of(net, sgd, probe=probe, options=options)
    assert np.isnan(found.scalars["ntk/drift_noise_floor"])
    assert found.scalars["ntk/sharpness"] == pytest.approx((X[0] @ X[0]) + 1)


@pytest.mark.parametrize(
    ("names", "arguments", "told"),
    [
        (["class_ratio", "trace"], {}, r"class_ratio \(one class for each example"),
        (["sharpness"], {"outputs": "trace"}, r"sharpness \(a kernel with all outputs"),
        (["batchnorm_gap"], {}, r"batchnorm_gap \(BatchNorm layers"),
        (["residual_modes"], {}, r"residual_modes \(a kernel with all outputs"),
    ],
)
def test_what_is_asked_for_and_cannot_be_measured_is_told_once(names, arguments, told):
    instrument = KernelInstrument(metrics=names, **arguments)
    instrument.start(Probe(torch.randn(4, 3)))
    net = nn.Linear(3, 2)
    with pytest.warns(UserWarning, match=told) as caught:
        instrument.measure(net, 0)
    assert len(caught) == 1
    assert "trace (" not in str(caught[0].message)
    instrument.measure(net, 1)  # warnings are errors here


def test_what_is_not_asked_for_by_name_is_left_out_in_silence():
    instrument = KernelInstrument(metrics="all")
    instrument.start(Probe(torch.randn(4, 3)))
    assert "ntk/class_ratio" not in instrument.measure(nn.Linear(3, 2), 0).scalars


def test_unknown_names_list_what_there_is():
    with pytest.raises(
        ValueError, match=r"\['sharpnes'\].*trace.*on demand.*sharpness"
    ):
        KernelInstrument(metrics=["sharpnes"])
    with pytest.raises(ValueError, match=r"unknown metrics \['al'\]"):
        KernelInstrument(metrics="al")
    for name in OF_PARTS:
        with pytest.raises(ValueError, match=rf'{name} are shares.*by="module"'):
            KernelInstrument(metrics=[name])
        KernelInstrument(metrics=[name], by="parameter")
    with pytest.raises(ValueError, match="loss='mse'; expected one of half_sum"):
        NTKOptions(loss="mse")


def test_metrics_of_your_own_may_be_matrices_and_groups():
    own = {
        "half": lambda view: view.traced / 2,
        "group": lambda view: {"modes/first": view.eigenvalues[0], "none/x": None},
    }
    instrument = KernelInstrument(metrics=own)
    instrument.start(PROBE)
    found = instrument.measure(product(*two_points()[0]), 0)
    assert [*found.scalars] == ["ntk_modes/first", "monitor/audit_error"]
    assert found.matrices["ntk/half"].numpy() == pytest.approx(kernels()[0] / 2)


def test_a_probe_without_a_label_has_no_classes():
    net, probe = classifier(), Probe(PROBE.inputs, torch.full((N,), -100))
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    _, found = all_of(net, sgd, probe=probe)
    assert np.isnan(found.scalars["ntk/target_alignment"])
    assert np.isfinite(found.scalars["ntk/trace"])
    of_classes = {"ntk/class_ratio", "ntk/class_blocks", "ntk/sharpness"}
    assert not of_classes & {*found.scalars, *found.matrices}


def test_examples_without_a_label_are_no_class():
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(5))
    y = torch.tensor([0, 1, 0, 1, 1, 0, -100, -100, -100])
    names = ["target_alignment", "class_ratio"]
    found = []
    for known in (slice(None), slice(6)):
        torch.manual_seed(6)
        net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        kernel, features = KernelInstrument(metrics=names), FeatureInstrument()
        scalars = {}
        for instrument in (kernel, features):
            instrument.start(Probe(x[known], y[known]))
            scalars |= instrument.measure(net, 0).scalars
        found.append(
            [scalars[f"ntk/{n}"] for n in names]
            + [scalars["features/target_alignment"]]
        )
    assert found[0] == pytest.approx(found[1], rel=1e-5)

"""Kernel scalars against formulas on paper, computed with NumPy in float64."""

import io

import numpy as np
import pytest
import torch
from torch import nn

from ntk_callbacks import NTKOptions, Probe
from ntk_callbacks.errors import ProbeMismatchError
from ntk_callbacks.instruments.kernel import KernelInstrument

N, D, C = 4, 5, 3
RNG = np.random.default_rng(7)
X = RNG.standard_normal((N, D))
CLASSES = np.array([2, 0, 1, 0])
PROBE = Probe(torch.tensor(X), torch.tensor(CLASSES))
CLOSE = {"rel": 1e-10, "abs": 1e-12}


def linear(bias=True, d=D):
    """f(x) = W x + b: the kernel is (X Xᵀ + 1) ⊗ I, whatever the weights."""
    return nn.Linear(d, C, bias=bias).double()


def product():
    """f(x) = v · W x with one output."""
    net = nn.Sequential(nn.Linear(D, 3, bias=False), nn.Linear(3, 1, bias=False))
    return net.double()


def set_weights(net, w, v):
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor(w))
        net[1].weight.copy_(torch.tensor(v)[None])


def product_kernel(w, v):
    """∂f/∂W = v xᵀ and ∂f/∂v = W x."""
    return (v @ v) * (X @ X.T) + (X @ w.T) @ (w @ X.T)


def measured(instrument, net, step=0, probe=PROBE):
    instrument.start(probe)
    return instrument.measure(net, step)


def centered_cosine(left, right):
    h = np.eye(N) - 1 / N
    left, right = h @ left @ h, h @ right @ h
    return (left * right).sum() / np.linalg.norm(left) / np.linalg.norm(right)


def test_every_scalar_of_a_linear_model():
    gram = X @ X.T + 1
    eigenvalues = np.repeat(np.linalg.eigvalsh(gram), C)
    shares = eigenvalues / eigenvalues.sum()
    one_hot = np.eye(C)[CLASSES]
    expected = {
        "ntk/trace": C * np.trace(gram),
        "ntk/eigenvalue_max": eigenvalues.max(),
        "ntk/eigenvalue_min": eigenvalues.min(),
        "ntk/condition_number": eigenvalues.max() / eigenvalues.min(),
        "ntk/participation_ratio": eigenvalues.sum() ** 2 / (eigenvalues**2).sum(),
        "ntk/entropy_rank": np.exp(-(shares * np.log(shares)).sum()),
        "ntk/relative_change": 0.0,
        "ntk/kernel_distance": 0.0,
        "ntk/kernel_velocity": np.nan,
        "ntk/target_alignment": centered_cosine(gram, one_hot @ one_hot.T),
        "ntk/off_diagonal_share": 0.0,
        "ntk/max_learning_rate": 2 / eigenvalues.max(),
    }
    found = measured(KernelInstrument(), linear())
    assert found.step == 0
    # Entries of the kernel of two examples, computed twice in float64.
    assert found.scalars.pop("monitor/audit_error") < 1e-12
    assert found.scalars == pytest.approx(expected, nan_ok=True, **CLOSE)
    log10 = found.vectors["ntk/eigenvalues_log10"]
    assert log10.numpy() == pytest.approx(np.log10(eigenvalues)[::-1], rel=1e-9)


def test_kernel_of_a_linear_model_never_moves():
    net = linear()
    instrument = KernelInstrument()
    measured(instrument, net)
    with torch.no_grad():
        net.weight += 3
    later = instrument.measure(net, 5).scalars
    for name in ("relative_change", "kernel_distance", "kernel_velocity"):
        assert later[f"ntk/{name}"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("outputs", "scale", "ranks"),
    [("full", C, C), ("diagonal", C, C), ("trace", 1, 1), ("pseudo", 1, 1)],
)
def test_outputs(outputs, scale, ranks):
    """The output axis multiplies the trace and repeats eigenvalues, if it is kept."""
    gram = X @ X.T + 1
    found = measured(KernelInstrument(outputs=outputs), linear()).scalars
    assert found["ntk/trace"] == pytest.approx(scale * np.trace(gram), **CLOSE)
    single = np.linalg.eigvalsh(gram)
    ratio = ranks * single.sum() ** 2 / (single**2).sum()
    assert found["ntk/participation_ratio"] == pytest.approx(ratio, **CLOSE)
    assert found["ntk/eigenvalue_max"] == pytest.approx(single.max(), **CLOSE)
    assert ("ntk/off_diagonal_share" in found) == (outputs == "full")


def test_drift_between_weights_made_by_hand():
    rng = np.random.default_rng(1)
    points = [(rng.standard_normal((3, D)), rng.standard_normal(3)) for _ in range(3)]
    kernels = [product_kernel(w, v) for w, v in points]
    net, instrument = product(), KernelInstrument()
    instrument.start(PROBE)
    found = []
    for step, (w, v) in zip((0, 4, 14), points, strict=True):
        set_weights(net, w, v)
        found.append(instrument.measure(net, step).scalars)

    def distance(left, right):
        return 1 - (left * right).sum() / np.linalg.norm(left) / np.linalg.norm(right)

    for scalars, kernel in zip(found, kernels, strict=True):
        assert scalars["ntk/trace"] == pytest.approx(np.trace(kernel), **CLOSE)
        moved = np.linalg.norm(kernel - kernels[0]) / np.linalg.norm(kernels[0])
        assert scalars["ntk/relative_change"] == pytest.approx(moved, **CLOSE)
        turned = distance(kernel, kernels[0])
        assert scalars["ntk/kernel_distance"] == pytest.approx(turned, **CLOSE)
    speeds = [distance(kernels[1], kernels[0]) / 4, distance(*kernels[1:]) / 10]
    assert np.isnan(found[0]["ntk/kernel_velocity"])
    for scalars, speed in zip(found[1:], speeds, strict=True):
        assert scalars["ntk/kernel_velocity"] == pytest.approx(speed, **CLOSE)


def test_distance_is_blind_to_scale_and_relative_change_is_not():
    net, instrument = product(), KernelInstrument()
    measured(instrument, net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter *= 2
    later = instrument.measure(net, 1).scalars
    assert later["ntk/kernel_distance"] == pytest.approx(0, abs=1e-12)
    assert later["ntk/relative_change"] == pytest.approx(3)  # (2² − 1)


def test_singular_kernel():
    """More examples than parameters per output: the smallest eigenvalues are zero."""
    x = torch.randn(6, 2, dtype=torch.float64)
    found = measured(KernelInstrument(), linear(bias=False, d=2), probe=Probe(x))
    assert found.scalars["ntk/condition_number"] == np.inf
    assert found.scalars["ntk/eigenvalue_min"] == pytest.approx(0, abs=1e-12)
    assert found.scalars["ntk/participation_ratio"] <= 2 * C
    assert "ntk/target_alignment" not in found.scalars
    vector = found.vectors["ntk/eigenvalues_log10"]
    assert vector.isfinite().all()


def test_alignment_with_real_targets():
    y = RNG.standard_normal((N, 2))
    probe = Probe(torch.tensor(X), torch.tensor(y))
    found = measured(KernelInstrument(), linear(), probe=probe).scalars
    expected = centered_cosine(X @ X.T + 1, y @ y.T)
    assert found["ntk/target_alignment"] == pytest.approx(expected, **CLOSE)


@pytest.mark.parametrize("outputs", ["full", "trace", "diagonal"])
@pytest.mark.parametrize(
    ("by", "names"),
    [
        ("module", {"0", "2"}),
        ("parameter", {"0.weight", "0.bias", "2.weight", "2.bias"}),
        ({"weights": "weight"}, {"weights", "rest"}),
    ],
    ids=["module", "parameter", "mapping"],
)
def test_traces_of_parts_add_up(by, names, outputs):
    net = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C)).double()
    found = measured(KernelInstrument(by=by, outputs=outputs), net).scalars
    parts = {t: v for t, v in found.items() if t.startswith("ntk_modules/")}
    assert {*parts} == {f"ntk_modules/trace/{name}" for name in names}
    assert sum(parts.values()) == pytest.approx(found["ntk/trace"], **CLOSE)
    whole = measured(KernelInstrument(outputs=outputs), net).scalars
    shared = {tag: value for tag, value in found.items() if tag in whole}
    assert shared == pytest.approx(whole, nan_ok=True, **CLOSE)


def test_selected_parameters():
    net = linear()
    found = measured(KernelInstrument(parameters="weight"), net).scalars
    assert found["ntk/trace"] == pytest.approx(C * np.trace(X @ X.T), **CLOSE)
    found = measured(KernelInstrument(parameters=lambda n, p: n == "bias"), net).scalars
    assert found["ntk/trace"] == pytest.approx(C * N, **CLOSE)
    assert found["ntk/participation_ratio"] == pytest.approx(C, **CLOSE)


def test_output_fn():
    instrument = KernelInstrument(output_fn=lambda model, x: model(x)[:, :1])
    found = measured(instrument, linear()).scalars
    assert found["ntk/trace"] == pytest.approx(np.trace(X @ X.T + 1), **CLOSE)


def test_names_of_some_metrics():
    chosen = ["kernel_distance", "trace"]
    found = measured(KernelInstrument(metrics=chosen), linear()).scalars
    assert [*found] == ["ntk/kernel_distance", "ntk/trace", "monitor/audit_error"]
    with pytest.raises(ValueError, match=r"unknown metrics \['tarce'\].*trace"):
        KernelInstrument(metrics=["tarce"])


def test_metrics_of_your_own():
    seen = []

    def spread(view):
        seen.append(view)
        return view.eigenvalues[0] - view.eigenvalues[-1]

    own = {
        "spread": spread,
        "n": lambda view: len(view.targets),
        "none": lambda v: None,
    }
    found = measured(KernelInstrument(metrics=own), linear())
    eigenvalues = np.linalg.eigvalsh(X @ X.T + 1)
    assert found.scalars.pop("monitor/audit_error") < 1e-12
    assert found.scalars == pytest.approx(
        {"ntk/spread": eigenvalues.max() - eigenvalues.min(), "ntk/n": N}, **CLOSE
    )
    assert {type(value) for value in found.scalars.values()} == {float}
    (view,) = seen
    assert view.previous is None
    assert view.reference is view.ntk
    assert view.traced.numpy() == pytest.approx(X @ X.T + 1)


def test_auto_keeps_all_outputs_up_to_the_limit():
    instrument = KernelInstrument(options=NTKOptions(dense_limit=12))
    found = measured(instrument, linear()).scalars
    same = measured(KernelInstrument(outputs="full"), linear()).scalars
    assert found == pytest.approx(same, nan_ok=True, **CLOSE)


def test_auto_traces_kernels_that_are_too_large_and_says_so():
    instrument = KernelInstrument(options=NTKOptions(dense_limit=11))
    with pytest.warns(UserWarning, match="has 12 rows, more than 11.*traced kernel"):
        found = measured(instrument, linear()).scalars
    same = measured(KernelInstrument(outputs="trace"), linear()).scalars
    assert found == pytest.approx(same, nan_ok=True, **CLOSE)
    assert instrument.state_dict()["outputs"] == "trace"
    # 2/λ_max of a traced kernel would be no limit of stability.
    assert not {"ntk/max_learning_rate", "ntk/off_diagonal_share"} & found.keys()


def test_auto_does_not_switch_in_the_middle_of_a_run():
    """A resumed run takes what the checkpoint measured, whatever the limit is now."""
    first = KernelInstrument(options=NTKOptions(dense_limit=1))
    with pytest.warns(UserWarning, match="traced kernel"):
        measured(first, linear())
    later = KernelInstrument()
    later.load_state_dict(first.state_dict())
    assert measured(later, linear(), 3).scalars["ntk/relative_change"] < 1e-12


def test_classes_of_every_token_are_no_targets_to_align_with():
    probe = Probe(torch.randn(4, 3), torch.randint(0, 9, (4, 5)))
    instrument = KernelInstrument()
    instrument.start(probe)
    found = instrument.measure(torch.nn.Linear(3, 2), 0).scalars
    assert "ntk/target_alignment" not in found
    assert "ntk/trace" in found


def test_name_of_the_tags():
    instrument = KernelInstrument(by="parameter", options=NTKOptions(name="last"))
    found = measured(instrument, linear())
    groups = {tag.split("/")[0] for tag in found.scalars}
    assert groups == {"last", "last_modules", "monitor"}
    assert "monitor/audit_error_last" in found.scalars
    assert [*found.vectors] == ["last/eigenvalues_log10"]
    assert [*found.matrices] == ["last/kernel"]


def test_heat_map_puts_classes_together():
    found = measured(KernelInstrument(), linear()).matrices["ntk/kernel"].numpy()
    order = [1, 3, 2, 0]  # classes 0, 0, 1, 2
    assert found == pytest.approx((X @ X.T + 1)[np.ix_(order, order)])


def test_train_mode_is_the_kernel_of_the_joint_batch():
    net = nn.Sequential(nn.BatchNorm1d(D), nn.Linear(D, C)).double()
    net[0].running_mean.fill_(9)
    instrument = KernelInstrument(options=NTKOptions(mode="train"), parameters="1")
    found = measured(instrument, net).scalars
    normal = (X - X.mean(0)) / np.sqrt(X.var(0) + net[0].eps)
    expected = C * np.trace(normal @ normal.T + 1)
    assert found["ntk/trace"] == pytest.approx(expected, **CLOSE)
    assert (net[0].running_mean == 9).all()


@pytest.mark.parametrize("route", ["vmap", "rows"])
def test_route(route):
    options = NTKOptions(route=route)
    found = measured(KernelInstrument(options=options), linear()).scalars
    assert found["ntk/trace"] == pytest.approx(C * np.trace(X @ X.T + 1), **CLOSE)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("by", [None, "module"])
def test_state_goes_through_a_file(by):
    net, going_on = product(), KernelInstrument(by=by)
    measured(going_on, net)
    with torch.no_grad():
        net[0].weight += 1
    going_on.measure(net, 3)
    resumed = KernelInstrument(by=by)
    resumed.load_state_dict(through_a_file(going_on.state_dict()))
    with torch.no_grad():
        net[1].weight -= 1
    expected = going_on.measure(net, 5).scalars
    assert measured(resumed, net, 5).scalars == expected
    assert expected["ntk/kernel_velocity"] > 0


def test_reference_is_not_that_of_later_weights():
    net, instrument = product(), KernelInstrument()
    measured(instrument, net)
    before = instrument.state_dict()["reference"].clone()
    with torch.no_grad():
        net[0].weight += 1
    instrument.measure(net, 1)
    assert torch.equal(instrument.state_dict()["reference"], before)
    assert not torch.equal(instrument.state_dict()["previous"], before)


def test_other_probe_or_other_outputs_are_refused():
    instrument = KernelInstrument()
    measured(instrument, linear())
    instrument.start(PROBE)  # the same is taken
    with pytest.raises(ProbeMismatchError, match=r"other inputs.*Pass the same probe"):
        instrument.start(Probe(torch.tensor(X) + 1e-9, PROBE.targets))
    instrument = KernelInstrument(metrics=["trace"])
    measured(instrument, linear())
    with pytest.raises(ProbeMismatchError, match="number of outputs changed"):
        instrument.measure(nn.Linear(D, 2).double(), 1)


def test_start_comes_first():
    with pytest.raises(RuntimeError, match=r"call start\(probe\) first"):
        KernelInstrument().measure(linear(), 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_weights_are_measured_in_float32(dtype):
    net = linear().to(dtype)
    instrument = KernelInstrument()
    found = measured(instrument, net).scalars
    x = X.astype(np.float32).astype(np.float64)
    assert found["ntk/trace"] == pytest.approx(C * np.trace(x @ x.T + 1), rel=1e-5)
    assert instrument.state_dict()["reference"].dtype == torch.float32
    assert net.weight.dtype == dtype


def test_nan_weights_give_nan_scalars():
    net = product()
    instrument = KernelInstrument()
    measured(instrument, net)
    with torch.no_grad():
        net[0].weight[0, 0] = torch.nan
    found = instrument.measure(net, 1)
    names = ("trace", "eigenvalue_max", "condition_number", "relative_change")
    assert all(np.isnan(found.scalars[f"ntk/{name}"]) for name in names)
    assert not len(found.vectors["ntk/eigenvalues_log10"])

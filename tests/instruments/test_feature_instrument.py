"""Every scalar of the features of small networks, by NumPy and by loops in float64."""

import io
import math

import numpy as np
import pytest
import torch
from torch import nn

from ntk_callbacks import Probe
from ntk_callbacks.errors import ProbeMismatchError
from ntk_callbacks.instruments.features import FeatureInstrument

KERNEL = {"target_alignment", "cka_to_init", "relative_change"} | {
    "participation_ratio",
    "entropy_rank",
}
PATTERNS = {"pattern_change", "pattern_change_recent", "dead_units"}


def network(gate=nn.ReLU, seed=0):
    torch.manual_seed(seed)
    parts = (nn.Linear(4, 9), gate(), nn.Linear(9, 6), gate(), nn.Linear(6, 3))
    return nn.Sequential(*parts).double()


def inputs(n=7):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=generator, dtype=torch.float64)


CLASSES = torch.tensor([2, 0, 1, 1, 2, 0, 0])


def started(targets=CLASSES, x=None, **settings):
    instrument = FeatureInstrument(**settings)
    instrument.start(Probe(inputs() if x is None else x, targets))
    return instrument


def names(found, group="features"):
    return {tag.removeprefix(f"{group}/") for tag in found.scalars}


def by_hand(net):
    """Pre-activations of both hidden layers and the conjugate kernel of the second."""
    w = [part.weight.detach().numpy() for part in net if isinstance(part, nn.Linear)]
    b = [part.bias.detach().numpy() for part in net if isinstance(part, nn.Linear)]
    first = inputs().numpy() @ w[0].T + b[0]
    second = np.maximum(first, 0) @ w[1].T + b[1]
    kernel = np.maximum(second, 0) @ np.maximum(second, 0).T / 6
    return (first.copy(), second.copy()), kernel


def cosine_centered(first, second):
    h = np.eye(7) - 1 / 7
    first, second = h @ first @ h, h @ second @ h
    return np.trace(first @ second) / math.sqrt(
        np.trace(first @ first) * np.trace(second @ second)
    )


def share(pre, other):
    differ = sum(
        (a > 0) != (b > 0)
        for one, two in zip(pre, other, strict=True)
        for a, b in zip(one.flat, two.flat, strict=True)
    )
    return differ / (7 * 15)


def dead(pre):
    return sum(all(z <= 0 for z in unit) for layer in pre for unit in layer.T) / 15


def test_every_number_of_three_networks():
    """Measured at the start, then elsewhere, then elsewhere again."""
    instrument = started()
    nets = [network(seed=seed) for seed in range(3)]
    found = [instrument.measure(net, 10 * i) for i, net in enumerate(nets)]
    pre, kernels = zip(*map(by_hand, nets), strict=True)
    one_hot = np.eye(3)[CLASSES.numpy()]
    for i, measured in enumerate(found):
        kernel = kernels[i]
        values = np.sort(np.linalg.eigvalsh(kernel))[::-1]
        shares = values[values > 1e-15] / values.sum()
        expected = {
            "target_alignment": cosine_centered(kernel, one_hot @ one_hot.T),
            "cka_to_init": cosine_centered(kernel, kernels[0]),
            "relative_change": math.sqrt(
                ((kernel - kernels[0]) ** 2).sum() / (kernels[0] ** 2).sum()
            ),
            "participation_ratio": values.sum() ** 2 / (values**2).sum(),
            "entropy_rank": math.exp(-sum(p * math.log(p) for p in shares)),
            "pattern_change": share(pre[i], pre[0]),
            "pattern_change_recent": share(pre[i], pre[i - 1]) if i else math.nan,
            "dead_units": dead(pre[i]),
        }
        expected = {f"features/{k}": v for k, v in expected.items()}
        assert measured.step == 10 * i
        assert measured.scalars == pytest.approx(
            expected, rel=1e-10, abs=1e-12, nan_ok=True
        )
        logs = measured.vectors["features/eigenvalues_log10"]
        top = np.log10(values[values > 1e-12])  # six features; the rest is round-off
        assert 4 <= len(top) <= 6
        np.testing.assert_allclose(logs[: len(top)].numpy(), top, rtol=1e-8)
        order = [1, 5, 6, 2, 3, 0, 4]
        np.testing.assert_allclose(
            measured.matrices["features/kernel"].numpy(),
            kernel[np.ix_(order, order)],
            rtol=1e-12,
        )
    assert 0 < found[1].scalars["features/pattern_change"] < 1
    assert found[2].scalars["features/dead_units"] > 0


def test_a_network_that_stays_and_one_that_is_negated():
    net, instrument = network(), started(per_layer=True)
    instrument.measure(net, 0)
    scalars = instrument.measure(net, 1).scalars
    assert scalars["features/relative_change"] == 0
    assert scalars["features/cka_to_init"] == pytest.approx(1, abs=1e-12)
    assert scalars["features/pattern_change"] == 0
    assert scalars["features/pattern_change_recent"] == 0
    for tensor in (net[0].weight, net[0].bias, net[2].weight, net[2].bias):
        tensor.data.neg_()
    scalars = instrument.measure(net, 2).scalars
    assert scalars["features_layers/pattern_change/1"] == 1
    again = instrument.measure(net, 3).scalars
    assert again["features/pattern_change"] == scalars["features/pattern_change"] > 0.5
    assert again["features/pattern_change_recent"] == 0


def test_each_gate_on_demand():
    instrument = started(per_layer=True, name="mine")
    instrument.measure(network(), 0)
    scalars = instrument.measure(network(seed=2), 1).scalars
    layers = {
        f"mine_layers/{what}/{layer}"
        for what in ("pattern_change", "dead_units")
        for layer in "13"
    }
    assert {t for t in scalars if t.startswith("mine_layers/")} == layers
    for what in ("pattern_change", "dead_units"):  # 9 and 6 of the 15 units
        parts = [scalars[f"mine_layers/{what}/{layer}"] for layer in "13"]
        mean = (9 * parts[0] + 6 * parts[1]) / 15
        assert scalars[f"mine/{what}"] == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize(
    ("gate", "settings", "expected"),
    [
        (nn.ReLU, {}, KERNEL | PATTERNS),
        (nn.LeakyReLU, {}, KERNEL | PATTERNS - {"dead_units"}),
        (nn.Tanh, {}, KERNEL),
        (nn.ReLU, {"patterns": False}, KERNEL),
    ],
)
def test_what_a_model_does_not_have_is_left_out(gate, settings, expected):
    assert names(started(**settings).measure(network(gate), 0)) == expected


def test_targets():
    net = network()
    untold = (KERNEL | PATTERNS) - {"target_alignment"}
    assert names(started(None).measure(net, 0)) == untold
    tokens = torch.zeros(7, 5, dtype=torch.long)
    assert "features/target_alignment" not in started(tokens).measure(net, 0).scalars
    y = inputs()[:, :2]
    kernel = by_hand(net)[1]
    found = started(y).measure(net, 0)
    expected = cosine_centered(kernel, y.numpy() @ y.numpy().T)
    assert found.scalars["features/target_alignment"] == pytest.approx(expected)
    np.testing.assert_allclose(found.matrices["features/kernel"].numpy(), kernel)


def test_a_named_layer_a_function_and_a_mode():
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    named = started(layer="1").measure(net, 0)
    function = started(layer="", output_fn=lambda m, x: m(x)).measure(net, 0)
    assert named.scalars == function.scalars
    trained = started(mode="train").measure(net, 0).scalars
    assert trained != started().measure(net, 0).scalars


def test_a_restored_instrument_goes_on():
    unbroken, first, second = started(), started(), FeatureInstrument()
    nets = [network(seed=seed) for seed in range(4)]
    for step, net in enumerate(nets[:2]):
        unbroken.measure(net, step)
        first.measure(net, step)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    second.start(Probe(inputs(), CLASSES))
    for step, net in enumerate(nets[2:], 2):
        assert second.measure(net, step).scalars == unbroken.measure(net, step).scalars


def test_a_state_does_not_change_afterwards():
    instrument = started()
    instrument.measure(network(), 0)
    state = instrument.state_dict()
    before = {k: p["bits"].clone() for k, p in state["previous"].items()}
    instrument.measure(network(seed=1), 1)
    assert all(torch.equal(state["previous"][k]["bits"], v) for k, v in before.items())


def test_dead_networks_give_nan_not_errors():
    net = network()
    net[2].bias.data.fill_(-100.0)
    scalars = started().measure(net, 0).scalars
    assert scalars["features/dead_units"] >= 6 / 15
    assert math.isnan(scalars["features/participation_ratio"])
    net[0].weight.data.fill_(torch.nan)
    assert math.isnan(started().measure(net, 0).scalars["features/relative_change"])


def test_what_does_not_fit_is_refused():
    with pytest.raises(RuntimeError, match="call start"):
        FeatureInstrument().measure(network(), 0)
    for settings, what in (
        ({"layer": 3}, "layer=3; expected the name"),
        ({"mode": "fast"}, "mode='fast'; expected one of eval, train"),
        ({"name": "a b"}, "name='a b'"),
        ({"output_fn": 3}, "output_fn must be callable"),
    ):
        with pytest.raises(ValueError, match=what):
            FeatureInstrument(**settings)
    instrument = started()
    with pytest.raises(ValueError, match="'6' is no layer of Sequential; it has 0, 1"):
        started(layer="6").measure(network(), 0)
    instrument.measure(network(), 0)
    with pytest.raises(ProbeMismatchError, match="other inputs"):
        instrument.start(Probe(inputs(5)))
    with pytest.raises(ProbeMismatchError, match=r"gates \['1', '3'\].*new run"):
        instrument.measure(network(nn.Tanh), 1)

"""How far weights have moved, against NumPy on one long vector."""

import io

import numpy as np
import pytest
import torch
from torch import nn

from ntk_callbacks.errors import UnsupportedModelError
from ntk_callbacks.instruments.instrument import tag_name
from ntk_callbacks.instruments.parameters import ParameterDriftInstrument

CLOSE = {"rel": 1e-12, "abs": 1e-14}
RNG = np.random.default_rng(3)


def network():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    nn.init.zeros_(net[2].bias)
    return net


def flat(net):
    return np.concatenate([p.detach().numpy().ravel() for p in net.parameters()])


def move(net):
    """Every weight by a random amount."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += torch.tensor(RNG.standard_normal(parameter.shape))


def test_polyline():
    net, instrument = network(), ParameterDriftInstrument()
    corners, found = [], []
    for step in (0, 2, 5, 9):
        if step:
            move(net)
        corners.append(flat(net).copy())
        found.append(instrument.measure(net, step))
    start = np.linalg.norm(corners[0])
    path = 0.0
    for index, (corner, measurement) in enumerate(zip(corners, found, strict=True)):
        if index:
            path += np.linalg.norm(corner - corners[index - 1])
        away = np.linalg.norm(corner - corners[0])
        cosine = corner @ corners[0] / np.linalg.norm(corner) / start
        expected = {
            "params/displacement": away / start,
            "params/path_length": path / start,
            "params/cosine_to_init": cosine,
        }
        totals = {tag: measurement.scalars[tag] for tag in expected}
        assert totals == pytest.approx(expected, **CLOSE)
    assert [measurement.step for measurement in found] == [0, 2, 5, 9]
    last = found[-1].scalars
    assert last["params/path_length"] > last["params/displacement"] > 0


def test_there_and_back_again():
    """The path remembers what the displacement forgets."""
    net, instrument = network(), ParameterDriftInstrument(per_tensor=False)
    instrument.measure(net, 0)
    length = np.linalg.norm(flat(net))
    for step, amount in ((1, 2.0), (2, -2.0)):
        with torch.no_grad():
            net[0].weight[0, 0] += amount
        found = instrument.measure(net, step).scalars
    assert found["params/displacement"] == pytest.approx(0, abs=1e-15)
    assert found["params/path_length"] == pytest.approx(4 / length, **CLOSE)
    assert found["params/cosine_to_init"] == pytest.approx(1, **CLOSE)


def test_scaled_weights():
    net, instrument = network(), ParameterDriftInstrument()
    instrument.measure(net, 0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter *= -3
    found = instrument.measure(net, 1).scalars
    expected = {
        "params/displacement": 4,
        "params/path_length": 4,
        "params/cosine_to_init": -1,
        **{
            f"params_tensors/displacement/{n}": 4
            for n in ("0.weight", "0.bias", "2.weight")
        },
    }
    assert found == pytest.approx(expected, **CLOSE)  # no curve for the zero bias


def test_every_tensor():
    net, instrument = network(), ParameterDriftInstrument()
    before = {n: p.detach().numpy().copy() for n, p in net.named_parameters()}
    instrument.measure(net, 0)
    move(net)
    found = instrument.measure(net, 1).scalars
    for name, parameter in net.named_parameters():
        if name == "2.bias":
            assert f"params_tensors/displacement/{name}" not in found
            continue
        away = np.linalg.norm(parameter.detach().numpy() - before[name])
        expected = away / np.linalg.norm(before[name])
        assert found[f"params_tensors/displacement/{name}"] == pytest.approx(
            expected, **CLOSE
        )


def test_tags_do_not_change_during_a_run():
    """A CSV file has one header; a tensor that reaches zero keeps its column."""
    net, instrument = network(), ParameterDriftInstrument()
    first = instrument.measure(net, 0).scalars
    with torch.no_grad():
        net[0].weight.zero_()
        net[2].bias.fill_(1)
    net[0].requires_grad_(False)
    assert [*instrument.measure(net, 1).scalars] == [*first]


@pytest.mark.parametrize(
    ("parameters", "names"),
    [
        ("weight", ["0.weight", "2.weight"]),
        (lambda name, p: p.ndim == 1, ["0.bias", "2.bias"]),
        (None, ["0.weight", "0.bias", "2.weight", "2.bias"]),
    ],
    ids=["pattern", "predicate", "all"],
)
def test_selected_parameters(parameters, names):
    net = network()
    instrument = ParameterDriftInstrument(parameters=parameters, per_tensor=False)
    instrument.measure(net, 0)
    before = {n: p.detach().numpy().copy() for n, p in net.named_parameters()}
    move(net)
    found = instrument.measure(net, 1).scalars
    now = {n: p.detach().numpy() for n, p in net.named_parameters()}
    away = np.sqrt(sum(((now[n] - before[n]) ** 2).sum() for n in names))
    start = np.sqrt(sum((before[n] ** 2).sum() for n in names))
    assert found["params/displacement"] == pytest.approx(away / start, **CLOSE)


def test_tied_weights_count_once():
    net = network()
    net.append(nn.ReLU())
    net.again = net[0]
    found = ParameterDriftInstrument().measure(net, 0).scalars
    names = {tag.removeprefix("params_tensors/displacement/") for tag in found}
    assert "0.weight" in names
    assert not any("again" in name for name in names)


def test_references_are_copies():
    net, instrument = network(), ParameterDriftInstrument()
    before = flat(net).copy()
    instrument.measure(net, 0)
    move(net)
    instrument.measure(net, 1)
    kept = instrument.state_dict()["reference"].values()
    assert np.concatenate([t.numpy().ravel() for t in kept]) == pytest.approx(before)
    assert not any(t.requires_grad for t in kept)


def test_state_goes_through_a_file():
    net, going_on = network(), ParameterDriftInstrument()
    going_on.measure(net, 0)
    move(net)
    going_on.measure(net, 1)
    file = io.BytesIO()
    torch.save(going_on.state_dict(), file)
    file.seek(0)
    resumed = ParameterDriftInstrument()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    move(net)
    assert resumed.measure(net, 2).scalars == going_on.measure(net, 2).scalars


def test_small_steps_of_half_precision_weights_are_seen():
    """Sums are taken in float64: one unit in the last place of one weight counts."""
    net = nn.Linear(3, 4).to(torch.bfloat16)
    instrument = ParameterDriftInstrument(per_tensor=False)
    instrument.measure(net, 0)
    with torch.no_grad():
        net.weight[0, 0] = net.weight[0, 0] * (1 + 2**-7)
    assert instrument.measure(net, 1).scalars["params/displacement"] > 1e-5


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("what", ["thaws", "is added", "was asked for", "freezes"])
def test_what_trains_only_later_is_told_of_once(what):
    net = network()
    net[0].requires_grad_(what == "freezes")
    every = (lambda name, p: True) if what == "was asked for" else None
    instrument = ParameterDriftInstrument(parameters=every, per_tensor=False)
    instrument.measure(net, 0)
    if what == "is added":
        net.append(nn.Linear(2, 2))
    net[0].requires_grad_(what in ("thaws", "was asked for"))
    if what in ("thaws", "is added"):
        first = "0.weight" if what == "thaws" else "3.weight"
        told = f"2 parameters that were frozen or.*{first[:1]}.bias.*about the 2 that"
        with pytest.warns(UserWarning, match=told):
            instrument.measure(net, 1)
    instrument.measure(net, 2)
    net.requires_grad_(False)
    instrument.measure(net, 3)


def test_parameter_that_is_gone():
    net, instrument = network(), ParameterDriftInstrument()
    instrument.measure(net, 0)
    with pytest.raises(
        UnsupportedModelError, match=r"no longer has \['2.weight', '2.bias'\]"
    ):
        instrument.measure(net[:2], 1)


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("net.0.weight", "net.0.weight"),
        ("net._orig_mod.0.weight", "net.0.weight"),
        ("_orig_mod.net.0.bias", "net.0.bias"),
        ("_forward_module.net.0.bias", "net.0.bias"),
        ("blocks.a b:c.weight", "blocks.a_b_c.weight"),
        (
            "net.parametrizations.weight.original0",
            "net.parametrizations.weight.original0",
        ),
        ("", "root"),
        ("größe", "gr__e"),
    ],
)
def test_names_as_tags(name, tag):
    assert tag_name(name) == tag

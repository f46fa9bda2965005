"""A probe is what it says it is, and comes back from a file as it was."""

import re
from collections import Counter

import numpy.random
import pytest
import torch
from data_sets import data
from scripts import run_script
from torch import nn
from torch.utils.data import DataLoader

from ntk_callbacks import Probe
from ntk_callbacks.errors import ProbeError


def printed(code, folder):
    """What code prints in a process of its own."""
    script = folder / "script.py"
    script.write_text(code)
    exit_code, output, errors = run_script(script, folder)
    assert exit_code == 0, errors
    return output


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

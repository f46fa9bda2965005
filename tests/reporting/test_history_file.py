"""The file of a history is read to the last bit, or it is said what is wrong."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from histories import RESUMED_MID_EPOCH, check, written
from safetensors import safe_open

from ntk_callbacks import load_history
from ntk_callbacks.record import Measurement
from ntk_callbacks.reporting.history import history_folders
from ntk_callbacks.reporting.history_file import FOLDER, HistoryFile

pytestmark = RESUMED_MID_EPOCH

# The file -------------------------------------------------------------------------


def test_what_was_written_is_read():
    history = load_history(written([0, 2, 5]))
    check(history, [0, 2, 5])
    assert [*history] == ["ntk/trace", "ntk/velocity", "ntk/eigenvalues"]
    assert "ntk/kernel" not in history
    assert repr(history).endswith("3 quantities, steps 0 to 5)")


def test_matrices_are_kept_on_request():
    history = load_history(written([0, 4], matrices=True))
    kernels = history["ntk/kernel"]
    assert kernels.steps.tolist() == [0, 4]
    np.testing.assert_array_equal(kernels.values[1], 4 * np.eye(2))
    assert history.matrices == ("ntk/kernel",)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e-300, 0.1, -0.0])
def test_a_number_is_kept_to_the_last_bit_and_the_file_is_strict_json(value):
    file = HistoryFile(Path("run", FOLDER), "ntk")
    file.append(Measurement(0, {"v": value}), -1)
    (found,) = load_history("run")["v"].values.tolist()
    assert repr(found) == repr(value)

    def refuse(text):
        raise AssertionError(f"{text} is no JSON")

    for line in (file.folder / "ntk.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize(
    "vector",
    [
        torch.tensor([1.5, 2.5]).bfloat16(),
        torch.tensor([1.5, 2.5]).half(),
        torch.tensor([1.5, 2.5, 9.0, 9.0])[:2],
        torch.tensor([[1.5, 0.0], [2.5, 0.0]])[:, 0],
        torch.tensor([1.5, 2.5], requires_grad=True),
    ],
    ids=["bfloat16", "half", "view", "strided", "gradient"],
)
def test_any_vector_becomes_an_array(vector):
    file = HistoryFile(Path("run", FOLDER), "ntk")
    file.append(Measurement(0, {}, {"v": vector, "same": vector}), -1)
    history = load_history("run")
    assert history["v"].values[0].tolist() == [1.5, 2.5]
    assert history["same"].values[0].tolist() == [1.5, 2.5]


def test_tensors_are_plain_safetensors():
    folder = written([3]) / FOLDER
    (path,) = folder.glob("*.safetensors")
    with safe_open(path, framework="np") as file:
        assert [*file.keys()] == ["ntk/eigenvalues"]


def test_names_of_monitors_do_not_meet():
    for name in ("ntk", "ntk/test", "ntk.test"):
        file = HistoryFile(Path("run", FOLDER), name)
        file.append(Measurement(1, {f"{name}/trace": 1.0}), -1)
    assert {*load_history("run")} == {"ntk.test/trace", "ntk/test/trace", "ntk/trace"}


# Errors -------------------------------------------------------------------------------


def test_no_such_folder():
    with pytest.raises(FileNotFoundError, match="there is no folder 'nowhere'"):
        load_history("nowhere")


def test_folder_without_a_history():
    Path("empty").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"'empty' holds no ntk_history .*beside"
    ):
        load_history("empty")


@pytest.mark.parametrize("folder", ["run", "run/ntk_history"])
def test_history_without_any_file(folder):
    Path("run", FOLDER).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="before its first measurement") as info:
        load_history(folder)
    assert "below it" not in str(info.value)


def test_folder_of_runs_says_where_they_are():
    written([0], "runs/a")
    written([0], "runs/b")
    with pytest.raises(FileNotFoundError, match="below it: runs/a, runs/b"):
        load_history("runs")
    assert history_folders("runs") == [Path("runs/a"), Path("runs/b")]
    assert history_folders("runs/a") == [Path("runs/a")]
    assert history_folders("runs/a/ntk_history") == [Path("runs/a")]
    check(load_history("runs/a/ntk_history"), [0])


def test_no_complete_measurement():
    path = written([0]) / FOLDER / "ntk.jsonl"
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(ValueError, match="no complete measurement"):
        load_history("run")


def test_newer_format():
    path = written([0]) / FOLDER / "ntk.jsonl"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match=r"format 2; .* reads up to 1\. Update"):
        load_history("run")


def test_unknown_tag_lists_the_known_ones():
    with pytest.raises(KeyError, match="'ntk/trac'; there are ntk/trace, ntk/velocity"):
        load_history(written([0]))["ntk/trac"]
    with pytest.raises(KeyError, match="keep_kernels=True"):
        load_history(written([0]))["ntk/kernel"]


def test_tensor_file_that_is_gone():
    folder = written([0, 1])
    (folder / FOLDER / "ntk-00000001.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"ntk/eigenvalues of step 1, is gone"):
        load_history(folder)["ntk/eigenvalues"]


def test_tensor_file_that_is_cut_short():
    folder = written([0, 1])
    path = folder / FOLDER / "ntk-00000001.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"ntk/eigenvalues of step 1, is damaged"):
        load_history(folder)["ntk/eigenvalues"]


def test_lines_of_another_kind_are_no_measurements():
    Path("data").mkdir()
    lines = [
        '{"text": "a", "step": 3}',
        "[1]",
        '{"format": "alpaca", "text": "b"}',
        '{"step": "3", "after": null, "scalars": {}}',
        '{"step": 3, "after": 0, "scalars": [1]}',
        '{"step": 3, "after": 0, "scalars": {"a": null}}',
        '{"step": 3, "after": 0, "scalars": {"a": 1.0}, "tensors": 2}',
    ]
    Path("data", "train.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="no complete measurement in 'data'"):
        load_history("data")

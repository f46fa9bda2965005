"""What the README says is run: its code blocks, its commands, its table of tags."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

import ntk_callbacks
from ntk_callbacks import Probe
from ntk_callbacks.cli_experiments import study_names
from ntk_callbacks.instruments.features import FeatureInstrument
from ntk_callbacks.instruments.jacobian import JacobianInstrument
from ntk_callbacks.instruments.kernel import KernelInstrument
from ntk_callbacks.instruments.linearization import LinearizationInstrument
from ntk_callbacks.instruments.parameters import ParameterDriftInstrument
from ntk_callbacks.instruments.prediction import PredictionInstrument
from ntk_callbacks.instruments.signal import SignalInstrument

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True)[1:]
    for line in README.splitlines()
    if line.startswith("ntk-train ") and "--help" not in line
]


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.splitlines()[-1])
def test_code_blocks_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})


def test_there_are_code_blocks_and_commands():
    assert len(PYTHON) >= 3
    assert len(COMMANDS) >= 4


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_compose(command):
    overrides = [word.split(",")[0] for word in command if word != "-m"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", overrides=overrides)
    assert "model" in config


def test_make_targets_exist():
    targets = re.findall(r"^make (\w+)", README, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_table_names_every_scalar():
    tables = [part.partition("\n\n")[0] for part in README.split("| tag |")[1:]]
    lines = [line for table in tables for line in table.splitlines()]
    rows = [line for line in lines if line.startswith("| `")]
    named = set()
    for row in rows:
        tags = re.findall(r"`([^`]+)`", row.split("|")[1])
        named |= {_whole(tag, tags[0]) for tag in tags}

    net = nn.Linear(4, 2)
    probe = Probe(torch.randn(3, 4), torch.tensor([0, 1, 1]))
    net(probe.inputs).sum().backward()
    prediction = PredictionInstrument()
    prediction.predict(net, torch.optim.SGD(net.parameters(), 0.1), 0)
    logged = {"monitor/seconds"}  # by the monitor around an instrument
    for instrument in (
        KernelInstrument(),
        KernelInstrument(outputs="matrix-free"),
        ParameterDriftInstrument(per_tensor=False),
        prediction,
    ):
        instrument.start(probe)
        logged |= instrument.measure(net, 0).scalars.keys()
    detailed = KernelInstrument(metrics="all")
    detailed.optimizers = [torch.optim.SGD(net.parameters(), 0.1)]
    detailed.start(probe)
    found = detailed.measure(nn.Sequential(nn.BatchNorm1d(4), net), 0).scalars
    logged |= {tag for tag in found if not tag.startswith("ntk_modes/")}
    linear = LinearizationInstrument(twin=True, held_out=probe)
    linear.start(probe)
    logged |= linear.measure(net, 0).scalars.keys()
    deep = nn.Sequential(net, nn.ReLU(), nn.Linear(2, 2))
    for instrument in (
        JacobianInstrument(by="depth"),
        SignalInstrument(),
        FeatureInstrument(),
    ):
        instrument.start(probe)
        logged |= instrument.measure(deep, 0).scalars.keys()
    assert named == logged


def _whole(tag, first):
    """`…_min` beside `ntk/eigenvalue_max` stands for `ntk/eigenvalue_min`."""
    return first.rsplit("_", 1)[0] + tag[1:] if tag.startswith("…") else tag


@pytest.mark.parametrize("name", ntk_callbacks.__all__)
def test_every_public_name_is_listed(name):
    table = README.partition("## All public names")[2].partition("\n## ")[0]
    assert f"`{name}`" in table


def test_every_example_is_listed_with_its_first_line():
    rows = re.findall(r"\| \[`(\w+)\.py`\]\(examples/\1\.py\) \| (.*) \|", README)
    first = {
        path.stem: path.read_text(encoding="utf-8").splitlines()[0].strip('".')
        for path in (ROOT / "examples").glob("*.py")
    }
    assert dict(rows) == first
    assert len(rows) == len(first)


def test_every_study_has_its_row():
    table = README.partition("| command |")[2].partition("\n\n")[0]
    named = re.findall(r"`ntk-train experiment=(\w+)`", table)
    assert named == study_names()
    figures = re.findall(r"\[figure\]\((\S+)\)", table)
    assert [Path(figure).stem for figure in figures] == named
    assert all((ROOT / figure).is_file() for figure in figures)

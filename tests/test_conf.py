"""Every configuration composes, and every key is an argument of its object."""

import copy
import inspect
import os
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

from ntk_callbacks.cli import KEYS, register_resolver
from ntk_callbacks.cli_errors import conf_dir

CONF = Path(__file__).parents[1] / "conf"
CHOICES = sorted(f"{path.parent.name}={path.stem}" for path in CONF.glob("*/*.yaml"))
BUILT_BY_ITSELF = ("model", "data", "optimizer", "logger", "checkpoint", "trainer")


@cache
def composition(*overrides):
    register_resolver()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", ["run_dir=elsewhere", *overrides])


def composed(tmp_path, *overrides):
    """The configuration as plain objects, of a run in a folder."""
    config = copy.deepcopy(composition(*overrides))
    config.run_dir = str(tmp_path)
    return OmegaConf.to_container(config, resolve=True)


def targets(node):
    if isinstance(node, dict):
        if "_target_" in node:
            yield node
        for child in node.values():
            yield from targets(child)


def test_the_checkout_is_preferred():
    assert conf_dir() == CONF


@pytest.mark.parametrize("choice", CHOICES)
def test_every_option_composes_to_arguments_that_exist(tmp_path, choice):
    config = composed(tmp_path, choice)
    assert set(config) == set(KEYS)
    found = list(targets(config))
    assert len(found) >= 5
    for node in found:
        keys = {key for key in node if not key.startswith("_")}
        assert next(iter(node)) == "_target_"
        assert keys <= set(inspect.signature(get_object(node["_target_"])).parameters)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder, and texts of what was built in it: most options have most in common."""
    return tmp_path_factory.mktemp("built"), set()


@pytest.mark.parametrize("choice", [c for c in CHOICES if "=gpu" not in c])
def test_every_option_builds(built, choice):
    folder, known = built
    config = composed(folder, choice)
    config["model"] |= {"in_shape": [1, 8, 8], "out_features": 10}
    nodes = [config[key] for key in BUILT_BY_ITSELF]
    for node in [*nodes, *(config["callbacks"] or {}).values()]:
        if repr(node) not in known:
            instantiate(node, _convert_="all")
            known.add(repr(node))


def test_objects_of_this_package_are_configured_by_public_names(tmp_path):
    for choice in CHOICES:
        for node in targets(composed(tmp_path, choice)):
            name = node["_target_"]
            if name.startswith("ntk_callbacks."):
                module, _, public = name.rpartition(".")
                assert public in get_object(module).__all__


def test_experiments_choose_groups_and_can_be_overridden_by_them(tmp_path):
    config = composed(tmp_path, "experiment=cnn", "optimizer=adam", "data=mnist")
    assert config["optimizer"]["_target_"] == "torch.optim.Adam"
    assert config["data"]["name"] == "mnist"
    assert "momentum" not in config["optimizer"]


def test_the_default_callbacks_are_the_three_monitors(tmp_path):
    callbacks = composed(tmp_path)["callbacks"]
    assert {k: v["_target_"] for k, v in callbacks.items()} == {
        "ntk": "ntk_callbacks.NTKMonitor",
        "params": "ntk_callbacks.ParameterDriftMonitor",
        "jacobian": "ntk_callbacks.JacobianMonitor",
    }
    assert composed(tmp_path, "callbacks.ntk.probe=8")["callbacks"]["ntk"]["probe"] == 8


@pytest.mark.slow
def test_an_installed_wheel_finds_its_own_configuration(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet"]
    made = subprocess.run(
        [*build, str(CONF.parent), "-w", str(tmp_path)], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code = "import ntk_callbacks.cli as c; print(c.conf_dir()); c.main()"
    words = ["experiment=mlp", "callbacks=none", "trainer.max_epochs=1"]
    run = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[0] == str(
        tmp_path / "site" / "ntk_callbacks" / "conf"
    )
    assert "test/accuracy" in run.stdout

"""Each study from its one command, at its smallest scale."""

import inspect
import json
import logging
import re
import signal
import sys
from pathlib import Path

import pytest
import yaml
from hydra.utils import instantiate
from one_of_a_kind import quick

from ntk_callbacks.cli import main
from ntk_callbacks.studies.run_study import scaled

CONF = Path(__file__).parents[2] / "conf" / "experiment"
STUDIES = sorted(
    path.stem
    for path in CONF.glob("*.yaml")
    if "study" in yaml.safe_load(path.read_text("utf-8"))
)


@pytest.fixture
def ntk_train(tmp_path, monkeypatch, capsys):
    """Runs the command in an empty directory; returns what it printed."""
    monkeypatch.chdir(tmp_path)
    handlers, interrupt = logging.root.handlers[:], signal.getsignal(signal.SIGINT)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["ntk-train", *words])
        main()
        return capsys.readouterr().out

    yield run
    logging.root.handlers[:] = handlers
    signal.signal(signal.SIGINT, interrupt)


@pytest.mark.parametrize("name", quick(STUDIES, "lazy_width", "linearized", "gating"))
def test_smallest_scale(ntk_train, name):
    ntk_train(f"experiment={name}", "scale=smoke")
    (folder,) = Path("outputs", name).iterdir()
    found = json.loads((folder / "findings.json").read_text())
    assert found["table"]
    assert found["checks"]
    assert (folder / "figure.png").stat().st_size > 5000
    said = ntk_train(f"experiment={name}", "scale=smoke", "ckpt=last")
    jobs = len([*(folder / "jobs").glob("*.json")])
    assert said.count("is there already") == jobs


@pytest.mark.parametrize("name", STUDIES)
def test_configuration_is_complete(name):
    config = yaml.safe_load((CONF / f"{name}.yaml").read_text("utf-8"))
    assert config["name"] == name
    assert {"paper", "smoke"} <= set(config["scales"])
    assert all(check["source"] for check in config["check"].values())


@pytest.mark.parametrize("scale", ["default", "paper"])
@pytest.mark.parametrize("name", STUDIES)
def test_jobs_of_every_scale_are_what_can_be_run(name, scale):
    config = yaml.safe_load((CONF / f"{name}.yaml").read_text("utf-8"))
    parameters = scaled(config["study"], config["scales"], scale, set())
    study = instantiate(parameters, _convert_="all")
    jobs = study.jobs()
    assert jobs
    for job, parameters in jobs.items():
        assert re.fullmatch(r"[A-Za-z0-9_.=,-]+", job)
        assert json.loads(json.dumps(parameters)) == parameters
        inspect.signature(study.run).bind(**parameters, device="cpu")


def test_failed_check_is_an_error_only_if_strict(ntk_train, capsys):
    words = ["experiment=lazy_width", "scale=smoke", "check.hidden_slope.value=5"]
    assert "FAILED" in ntk_train(*words)
    with pytest.raises(SystemExit, match="lazy_width: a check failed"):
        ntk_train(*words, "ckpt=last", "strict=true")


def test_what_a_study_cannot_use_is_refused(ntk_train):
    with pytest.raises(SystemExit, match=r"model\.width means nothing to it.*widths"):
        ntk_train("experiment=lazy_width", "scale=smoke", "model.width=3")
    with pytest.raises(SystemExit, match=r"trainer\.max_epochs means nothing"):
        ntk_train("experiment=lazy_width", "scale=smoke", "trainer.max_epochs=3")
    Path("some.ckpt").touch()
    with pytest.raises(SystemExit, match="goes on with ckpt=last"):
        ntk_train("experiment=lazy_width", "scale=smoke", "ckpt=some.ckpt")
    with pytest.raises(SystemExit, match="scale=big: expected one of default, paper"):
        ntk_train("experiment=lazy_width", "scale=big")


def test_own_parameters_go_before_the_scale(ntk_train):
    ntk_train("experiment=lazy_width", "scale=smoke", "study.widths=[4,8,16]")
    (folder,) = Path("outputs", "lazy_width").iterdir()
    names = sorted(p.stem for p in (folder / "jobs").iterdir())
    assert names == ["width=16,seed=0", "width=4,seed=0", "width=8,seed=0"]

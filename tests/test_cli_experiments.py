"""All studies from one command, and the table it prints."""

import _thread
import signal
import sys
import threading

import pytest

from ntk_callbacks import cli_experiments
from ntk_callbacks.cli_experiments import Finished, main, study_names, table


@pytest.fixture
def ntk_experiments(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["ntk-experiments", *words])
        main()
        return capsys.readouterr().out

    return run


def finished(name="some", *, passed=True, measured=0.51234, checks=2):
    check = {"name": "slope", "measured": measured, "expected": "0.5 ± 0.1"}
    found = {"seconds": 90.0, "checks": [check | {"passed": passed}] * checks}
    return Finished(name, cli_experiments.Path("folder"), found, "said")


def test_table_of_checked_numbers():
    rows = table([finished(), finished("other", passed=False, checks=1)])
    assert rows.splitlines()[2:] == [
        "| `ntk-train experiment=some` | 1.5 | folder/figure.png | slope | 0.5 ± 0.1 "
        "| 0.5123 | ok |",
        "|  |  |  | slope | 0.5 ± 0.1 | 0.5123 | ok |",
        "| `ntk-train experiment=other` | 1.5 | folder/figure.png | slope | 0.5 ± 0.1 "
        "| 0.5123 | **failed** |",
    ]
    nothing = Finished("none", cli_experiments.Path("folder"), None, "")
    assert table([nothing]).endswith("| | | | | | **no result** |")


def test_studies_are_found():
    assert "lazy_width" in study_names()
    assert "mlp" not in study_names()


FAILS = ["lazy_width", "--set", "scale=smoke", "--set", "seed=1"]


@pytest.mark.slow
def test_study_that_fails_its_checks_is_an_error(ntk_experiments, capsys):
    with pytest.raises(SystemExit) as stop:
        ntk_experiments(*FAILS)
    assert stop.value.code == 1
    said = capsys.readouterr().out
    assert "1/1  lazy_width  FAILED" in said
    assert "| hidden_slope | -1 ± 0.1 |" in said
    assert "is there already" not in said


@pytest.mark.slow
def test_study_goes_on_in_the_same_folder(ntk_experiments, capsys):
    for _ in range(2):
        with pytest.raises(SystemExit):
            ntk_experiments(*FAILS)
    assert "2/2  width=16,seed=0  is there already" in capsys.readouterr().out


def test_all_that_pass_end_well(ntk_experiments, monkeypatch):
    monkeypatch.setattr(cli_experiments, "run_one", lambda name, *_: finished(name))
    said = ntk_experiments("--at-once", "3", "--folder", "here")
    assert said.count("  ok\n") == len(study_names())
    assert said.count("| folder/figure.png |") == len(study_names())


def test_an_interrupt_starts_no_further_study(ntk_experiments, monkeypatch, capsys):
    started, ended = [], threading.Event()

    def interrupted(name, *_):
        started.append(name)
        _thread.interrupt_main()  # as Ctrl-C does, which ends the study as well
        ended.wait(1)
        return finished(name)

    monkeypatch.setattr(cli_experiments, "run_one", interrupted)
    # A shell ignores Ctrl-C for what it runs in the background, such as these tests.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as stop:
            ntk_experiments("--at-once", "1")
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.value.code == 130
    assert started == study_names()[:1]
    assert "the same command goes on" in capsys.readouterr().err


def test_wrong_words(ntk_experiments, capsys):
    for words in (["lazy_widht"], ["--at-once", "0"]):
        with pytest.raises(SystemExit) as stop:
            ntk_experiments(*words)
        assert stop.value.code == 2
    assert "no such study: lazy_widht; there are " in "".join(
        str(part) for part in [capsys.readouterr().err]
    )

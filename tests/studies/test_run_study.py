"""Jobs that are run once, checks that fail, and studies that go on after a break."""

import json
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ntk_callbacks.studies.checks import Check, verdict_lines, verdicts
from ntk_callbacks.studies.run_study import lines, run_study, scaled
from ntk_callbacks.studies.slopes import log_log_slope, mean_by
from ntk_callbacks.studies.study import Findings


@dataclass(frozen=True)
class Squares:
    """The squares of some numbers, and chance."""

    numbers: list
    ran: ClassVar[list] = []

    def jobs(self):
        return {f"number={n}": {"number": n} for n in self.numbers}

    @staticmethod
    def run(*, number, device):
        Squares.ran.append(number)
        if number < 0:
            raise KeyboardInterrupt
        return {"square": number**2, "chance": float(torch.rand(())), "on": device}

    def findings(self, results):
        table = [
            {"number": r["number"], "square": r["square"]} for r in results.values()
        ]
        return Findings(table, {"largest": max(r["square"] for r in results.values())})

    def draw(self, results, figure):
        axes = figure.subplots()
        axes.plot([r["number"] for r in results.values()])


@pytest.fixture(autouse=True)
def _none_ran():
    Squares.ran.clear()


def run(folder, numbers=(1, 2, 3), said=None, **settings):
    settings.setdefault("checks", {"largest": Check(at_most=10)})
    say = (lambda _: None) if said is None else said.append
    return run_study(Squares(list(numbers)), folder, say=say, **settings)


def test_everything_a_study_leaves(tmp_path):
    outcome = run(tmp_path, device="meta")
    assert outcome.passed
    assert Squares.ran == [1, 2, 3]
    kept = json.loads((tmp_path / "jobs" / "number=2.json").read_text())
    assert kept["parameters"]["number"] == 2
    assert kept["result"]["square"] == 4
    assert kept["result"]["on"] == "meta"
    found = json.loads((tmp_path / "findings.json").read_text())
    assert found["numbers"] == {"largest": 9}
    assert found["checks"][0]["passed"]
    assert found["checks"][0]["expected"] == "≤ 10"
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "table.txt").read_text().splitlines() == lines(outcome)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert board.Tags()["images"] == ["figure"]


def test_finished_jobs_are_not_run_again(tmp_path):
    said = []
    first = run(tmp_path, [1, 2], said)
    more = run(tmp_path, [1, 2, 3], said)
    assert Squares.ran == [1, 2, 3]
    assert said[-3:-1] == [f"{i}/3  number={i}  is there already" for i in (1, 2)]
    assert more.seconds > first.seconds


def test_interrupted_study_goes_on_to_the_same_results(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", [1, 2, -1])
    (tmp_path / "broken" / "jobs" / "number=3.json").write_text('{"parameters": {"nu')
    run(tmp_path / "broken", [1, 2, 3, 4])
    run(tmp_path / "whole", [4, 3, 2, 1])  # chance does not depend on the order
    for n in (1, 2, 3, 4):
        texts = [
            json.loads((tmp_path / k / "jobs" / f"number={n}.json").read_text())
            for k in ("broken", "whole")
        ]
        assert texts[0]["result"] == texts[1]["result"]


def test_other_parameters_and_other_seeds_are_other_jobs(tmp_path):
    run(tmp_path)
    before = json.loads((tmp_path / "jobs" / "number=1.json").read_text())
    run(tmp_path, seed=1)
    after = json.loads((tmp_path / "jobs" / "number=1.json").read_text())
    assert before["result"]["chance"] != after["result"]["chance"]
    assert Squares.ran == [1, 2, 3] * 2


def test_failed_check_is_told(tmp_path):
    outcome = run(tmp_path, checks={"largest": Check(value=8, tolerance=0.5)})
    assert not outcome.passed
    assert lines(outcome)[-1].split() == ["largest", "9", "8", "±", "0.5", "FAILED"]


def test_two_numbers_of_one_name_are_an_error(tmp_path, monkeypatch):
    twice = staticmethod(lambda *, number, device: {"square": 4, "number": 2})
    monkeypatch.setattr(Squares, "run", twice)
    with pytest.raises(
        ValueError, match="number=1: parameters and results both have number"
    ):
        run(tmp_path)
    assert not list((tmp_path / "jobs").iterdir())


def test_what_a_study_refuses(tmp_path):
    with pytest.raises(ValueError, match="no job"):
        run(tmp_path, [])
    with pytest.raises(ValueError, match="finds no smallest; it finds largest"):
        run(tmp_path, checks={"smallest": Check(at_least=0)})


@pytest.mark.parametrize(
    ("check", "inside", "outside"),
    [
        (Check(value=-0.5, tolerance=0.1), [-0.5, -0.6, -0.4], [-0.61, 0.5, math.nan]),
        (Check(at_least=2), [2, math.inf], [1.99, math.nan]),
        (Check(at_most=2), [2, -math.inf], [2.01, math.nan]),
        (Check(at_least=1, at_most=2), [1, 2], [0.9, 2.1, math.nan]),
    ],
)
def test_what_a_check_holds_to(check, inside, outside):
    assert all(check.holds(number) for number in inside)
    assert not any(check.holds(number) for number in outside)


@pytest.mark.parametrize(
    "wrong",
    [
        *({}, {"value": 1.0}, {"tolerance": 1.0}, {"at_least": "x"}),
        {"value": 1.0, "tolerance": 0.1, "at_most": 2.0},
    ],
)
def test_checks_that_say_nothing_or_too_much(wrong):
    with pytest.raises(ValueError, match="check: "):
        Check(**wrong)


def test_verdicts_in_columns():
    found = verdicts(
        {"a": 1.0, "b": math.nan, "c": 0},
        {"b": Check(at_least=0, source="here"), "a": Check(at_most=2)},
    )
    assert [line.split() for line in verdict_lines(found)] == [
        ["checked", "measured", "expected", "source"],
        ["b", "nan", "≥", "0", "FAILED", "here"],
        ["a", "1", "≤", "2", "ok"],
    ]


def test_scales():
    scales = {"paper": {"width": 512, "seeds": 20}}
    assert scaled({"width": 8, "a": 1}, scales, "default", set()) == {
        "width": 8,
        "a": 1,
    }
    assert scaled({"width": 8, "seeds": 1}, scales, "paper", {"width"}) == {
        "width": 8,
        "seeds": 20,
    }
    with pytest.raises(ValueError, match="scale=large: expected one of default, paper"):
        scaled({}, scales, "large", set())


def test_slopes():
    assert log_log_slope({x: 3 * x**-0.7 for x in (2, 5, 11)}) == pytest.approx(-0.7)
    assert math.isnan(log_log_slope({1: 1.0}))
    assert math.isnan(log_log_slope({1: 1.0, 2: 0.0}))
    results = {str(i): {"n": i % 2, "v": float(i)} for i in range(4)}
    assert mean_by(results, "n", "v") == {0: 1.0, 1: 2.0}

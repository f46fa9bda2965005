"""Where ReLU units bend, the target, and what is found in made-up results."""

import math

import pytest
import torch

from ntk_callbacks.experiments.models import MLP
from ntk_callbacks.studies.elbows import BENDS, Elbows, elbows, path_moments, target


def test_units_bend_at_their_elbows():
    torch.manual_seed(0)
    model = MLP((1,), 1, 12, 1, "relu", "ntk", math.sqrt(2), 0.7).double()
    places = elbows(model)
    near = 1e-6
    for k, place in enumerate(places):
        beside = torch.stack([place - near, place, place + near])[:, None]
        before, at, after = torch.relu(model.hidden[0](beside))[:, k].tolist()
        assert at == pytest.approx(0.0, abs=1e-12)
        assert min(before, after) == 0 < max(before, after)


def test_target():
    assert BENDS == (-0.5, 0.3)
    x = torch.tensor([-1.0, -0.5, 0.3, 1.0]).double()
    assert target(x).tolist() == pytest.approx([-1.0, -1.5, 0.9, 0.2])
    middle = (x[1:] + x[:-1]) / 2
    ends = target(x)
    assert target(middle).tolist() == pytest.approx(
        ((ends[1:] + ends[:-1]) / 2).tolist()
    )
    grid = torch.linspace(-1, 1, 41, dtype=torch.float64)  # what networks see
    assert all((grid - bend).abs().min() < 1e-12 for bend in BENDS)


def test_moments():
    assert path_moments(1) == [0, 1]
    moments = path_moments(2000)
    assert moments[:3] == [0, 1, 2]
    assert moments[-1] == 2000
    assert moments == sorted(set(moments))


def test_a_lazy_network_does_what_its_twin_does():
    settings = {"seed": 0, "width": 20, "steps": 20, "with_twin": True, "device": "cpu"}
    found = []
    for scale in (0.2, 50.0):
        torch.manual_seed(1)
        found.append(Elbows.run(scale=scale, **settings))
    rich, lazy = found
    assert rich["paths"][0] == lazy["paths"][0]
    assert lazy["twin_gap"] < 0.1 * rich["twin_gap"]
    assert lazy["elbow_change"] < 0.1 * rich["elbow_change"]
    moved = [
        abs(b - a)
        for a, b in zip(rich["paths"][0], rich["paths"][-1], strict=True)
        if abs(a) < 1
    ]
    middle = sorted(moved)[(len(moved) - 1) // 2]
    assert rich["elbow_change"] == pytest.approx(middle)


def test_findings():
    results = {
        f"scale={scale},seed={seed}": {
            "scale": scale,
            "error": 0.001 * scale * (seed + 1),
            "elbow_change": (seed + 1) / scale,
            "kernel_change": 0.5,
            "twin_gap": 1 / scale if seed == 0 else 0.0,
        }
        for scale in (1, 8, 16)
        for seed in (0, 1)
    }
    results["scale=1,seed=0"]["elbow_change"] = 0.2
    numbers = Elbows([1, 8, 16], seeds=2).findings(results).numbers
    assert numbers == pytest.approx(
        {
            "approximation_error": 0.002,
            "rich_elbow_change": 1.1,
            "lazy_elbow_change": 1.5 / 16,
            "lazy_elbow_slope": -1.0,
            "lazy_twin_gap": 1 / 16,
            "rich_twin_gap": 1.0,
        }
    )


def test_the_rich_and_the_lazy_network_that_are_drawn_have_twins():
    jobs = Elbows([0.1, 8, 64], seeds=2).jobs()
    assert len(jobs) == 6
    with_twin = [name for name, job in jobs.items() if job["with_twin"]]
    assert with_twin == ["scale=0.1,seed=0", "scale=64,seed=0"]

"""The gap to the linearization: what is counted, and a model that has none."""

import pytest
import torch

from ntk_callbacks.experiments.models import MLP
from ntk_callbacks.studies.linearized import Linearized, logarithmic, points

SETTINGS = {"share": 0.4, "depth": 1, "device": "cpu"}


def test_a_linear_model_has_no_gap():
    found = Linearized.run(
        width=1, seed=0, train_twin=True, steps=20, share=0.4, depth=0, device="cpu"
    )
    assert found["at"] == [0, 1, 2, 3, 4, 6, 7, 10, 13, 18, 20]
    assert max(found["gaps"]) < 1e-12
    assert found["twin_gap"] < 1e-12
    assert abs(found["network"][-1]) > 0.1


def test_outputs_are_those_of_a_plain_loop():
    """The network by hand, and f₀ + (1 − (1 − ηΘ)ᵏ) y with Θ from autograd."""
    torch.manual_seed(0)
    found = Linearized.run(width=5, seed=0, train_twin=True, steps=7, **SETTINGS)
    torch.manual_seed(0)
    x, y = points("cpu")
    model = MLP((6,), 1, 5, 1, "tanh", "ntk", 1.5, 0.1).double()
    f0 = model(x)
    rows = []
    for output in f0[:, 0]:
        gradients = torch.autograd.grad(
            output, [*model.parameters()], retain_graph=True
        )
        rows.append(torch.cat([g.flatten() for g in gradients]))
    ntk = torch.stack(rows) @ torch.stack(rows).T
    rate = 0.4 / torch.linalg.eigvalsh(ntk)[-1].item()
    f0, f = f0.detach(), torch.zeros_like(y)
    for k in range(8):
        network = model(x)
        if k in found["at"]:
            i = found["at"].index(k)
            gap = (network - f0 - f).abs().max().item()
            assert found["gaps"][i] == pytest.approx(gap, rel=1e-9, abs=1e-12)
            assert found["twin"][i] == pytest.approx(f[0, 0].item(), abs=1e-12)
        model.zero_grad()
        (network - f0 - y).square().sum().div(2).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= rate * p.grad
        f = f - rate * ntk @ (f - y)
    assert found["twin_gap"] < 1e-12
    assert found["gaps"][-1] > 1e-3


def test_slope_parting_and_twins():
    def result(width, **twin):
        gaps = [0.0, 32 / width, 1 / width**2]
        return {"width": width, "at": [0, 1, 10], "gaps": gaps, **twin}

    results = {str(n): result(n) for n in (4, 64, 1024)}
    results["16"] = result(16, twin=[], twin_gap=0.5)
    study = Linearized({4: 1, 16: 1, 64: 1, 1024: 1}, lazy_from=16, parted=0.4)
    numbers, table = study.findings(results).numbers, study.findings(results).table
    assert numbers["gap_slope"] == pytest.approx(-1)
    assert numbers["largest_gap_of_widest"] == 1 / 32
    assert numbers["gap_at_the_end_of_widest"] == 1024**-2
    assert numbers["twin_gap"] == 0.5
    assert [row["parted_at_step"] for row in table] == [1, 1, 1, "never"]
    assert logarithmic(1) == [0, 1]

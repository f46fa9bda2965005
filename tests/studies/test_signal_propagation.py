"""What `signal_propagation` holds networks to, by sums that share no code with it."""

import math

import pytest
import torch

from ntk_callbacks.studies.signal_propagation import SignalPropagation
from ntk_callbacks.studies.tasks import digits

STUDY = SignalPropagation(width=8, depth=3, seeds=2, examples=3, steps=1)


def recursion(depth):
    """q, mean c over pairs and χ of tanh networks, by sums on a grid."""
    z = torch.arange(-8, 8.05, 0.1, dtype=torch.float64)
    density = 0.1 * (-(z**2) / 2).exp() / math.sqrt(2 * math.pi)
    x, _ = digits(3)
    x = x / (x.square().mean(1, keepdim=True)) ** 0.5
    first = [float(x[i] @ x[j]) / 64 for i, j in ((0, 1), (0, 2), (1, 2))]
    q = 1.5**2 + 0.05
    pairs = [(1.5**2 * overlap + 0.05) / q for overlap in first]
    rows = []
    for _ in range(depth):
        slopes = 1 - (q**0.5 * z).tanh() ** 2
        rows.append((q, sum(pairs) / 3, 1.5**2 * float(density @ slopes**2)))
        after = 1.5**2 * float(density @ (q**0.5 * z).tanh() ** 2) + 0.05
        u = (q**0.5 * z).tanh()
        for k, c in enumerate(pairs):
            v = (q**0.5 * (c * z[:, None] + (1 - c**2) ** 0.5 * z)).tanh()
            mean = float((density * u) @ v @ density)
            pairs[k] = (1.5**2 * mean + 0.05) / after
        q = after
    return [list(column) for column in zip(*rows, strict=True)]


def made_up(**factors):
    """Two networks on both sides of the recursion, off by given factors."""
    columns = dict(zip(("q", "c", "chi"), recursion(3), strict=True))
    common = {"loss_share": 0.25, "live_difference": 0.125}
    return {
        job: {
            **common,
            **{
                name: [value * (1 + shift) * factors.get(name, 1) for value in column]
                for name, column in columns.items()
            },
        }
        for job, shift in (("start,seed=0", 0.1), ("live", -0.1))
    }


def test_networks_that_follow_the_recursion_have_no_error():
    found = STUDY.findings(made_up())
    for name in ("q_worst_error", "c_worst_error", "chi_worst_error"):
        assert found.numbers[name] < 1e-9
    assert found.numbers["live_difference"] == 0.125
    assert found.numbers["live_loss_share"] == 0.25
    assert [row["layer"] for row in found.table] == [1, 2, 3]


@pytest.mark.parametrize("name", ["q", "c", "chi"])
def test_error_is_that_of_the_worst_layer(name):
    found = STUDY.findings(made_up(**{name: 1.2})).numbers
    expected = 0.2 * max(recursion(3)[1]) if name == "c" else 0.2
    assert found[f"{name}_worst_error"] == pytest.approx(expected)
    rest = {"q", "c", "chi"} - {name}
    assert all(found[f"{other}_worst_error"] < 1e-9 for other in rest)


def test_what_the_monitor_saw_is_kept_by_step():
    torch.manual_seed(0)
    job = STUDY.jobs()["live"]
    found = SignalPropagation.run(**job | {"steps": 2}, device="cpu")
    assert found["live_steps"] == [0, 1, 2]
    for name in ("q", "c", "chi"):
        by_step = torch.tensor(found[f"live_{name}"])
        assert by_step.shape == (3, 3)
        assert by_step[0].tolist() == pytest.approx(found[name], rel=1e-5)
        assert (by_step[1] != by_step[2]).all()

"""What is read off the growth and the losses of residual networks."""

import math

import pytest
import torch

from ntk_callbacks.studies import ResNetInit
from ntk_callbacks.studies.residual_networks import ResidualBlock, final_loss, growth

STUDY = ResNetInit(
    [4, 16],
    [0.25, 0.5, 1.0],
    [0.1],
    [0.1, 0.001],
    contrast_depth=16,
    depth=6,
    seeds=2,
    deep_depth=40,
    deep_seeds=1,
    training_seeds=2,
)


def made_up(job):
    if job["part"] == "growth":
        blocks = range(job["depth"] + 1)
        if job["activation"] == "relu":
            signal = [1.5**block for block in blocks]
            return {"signal": signal, "gradient": [7 / p for p in signal]}
        signal = [max(block, 0.5) ** 1.1 for block in blocks]
        return {"signal": signal, "gradient": [math.exp(-(b**0.5)) for b in blocks]}
    if job["depth"] == 16 and job["scale"] == 1:
        return {"loss": None if job["seed"] else 3.0}
    # Best at 1/√depth.
    return {"loss": 0.1 + abs(math.log(job["scale"] * job["depth"] ** 0.5))}


@pytest.fixture
def results():
    return {name: {**job, **made_up(job)} for name, job in STUDY.jobs().items()}


def test_numbers_of_known_results(results):
    numbers = STUDY.findings(results).numbers
    assert numbers["relu_log_gradient"] == pytest.approx(6 * math.log(1.5))
    assert numbers["relu_growth"] == pytest.approx(1.5)
    assert numbers["tanh_log_signal"] == pytest.approx(1.1 * math.log(6))
    assert numbers["tanh_log_gradient"] == pytest.approx(6**0.5)
    assert numbers["tanh_exponent"] == pytest.approx(1.1)
    assert numbers["tanh_gradient_rate"] == pytest.approx(1.0)
    assert numbers["best_scale_slope"] == pytest.approx(-0.5)
    assert numbers["largest_rise"] == pytest.approx(0.5)
    assert numbers["scaled_loss"] == pytest.approx(0.1)
    assert math.isinf(numbers["unscaled_loss"])  # one of the two seeds diverged


def test_a_network_that_learns_unscaled_is_seen(results):
    for result in results.values():
        unscaled = result["part"] == "training" and result["scale"] == 1
        if unscaled and result["learning_rate"] == 0.001:
            result["loss"] = 0.01
    assert STUDY.findings(results).numbers["unscaled_loss"] == pytest.approx(0.01)


def test_growth_is_that_of_the_branches():
    torch.manual_seed(0)
    found = growth(activation="relu", width=1000, depth=3, examples=50, device="cpu")
    assert found["signal"][0] == pytest.approx(1.0, rel=1e-5)
    assert found["signal"] == pytest.approx([1.5**k for k in range(4)], rel=0.15)
    ratios = [found["gradient"][0] / g for g in found["gradient"]]
    assert ratios == pytest.approx([1.5**k for k in range(4)], rel=0.15)


def test_scale_is_the_product_of_both_deviations():
    torch.manual_seed(0)
    block = ResidualBlock(200, 0.25, "tanh")
    for layer in (block.inner, block.outer):
        assert layer.weight.var().item() * 200 == pytest.approx(0.25, rel=0.05)


def test_divergence_is_no_number():
    settings = {"width": 8, "depth": 4, "scale": 4.0, "examples": 10, "device": "cpu"}
    assert final_loss(learning_rate=1e6, steps=8, **settings) == {"loss": None}
    assert final_loss(learning_rate=0.0, steps=1, **settings)["loss"] > 0

"""What a kernel really takes: the high-water mark of a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MIB = 2**20
CLEAR = Path("/proc/self/clear_refs")

MEASURE = """
import gc, json, sys
import torch
from bench.models import build
from bench.roster import Case
from bench.worker import forget_peak, status, trim
from ntk_callbacks import empirical_ntk, plan_ntk

n, budget = int(sys.argv[1]), sys.argv[2] or None
torch.set_num_threads(1)
model, x = build(Case("resnet", n))
empirical_ntk(model, x[:2])  # libraries allocate at first use
plan = plan_ntk(model, x, memory_budget=budget)

def highest(call):
    gc.collect(); trim()
    before = status("VmRSS")
    forget_peak()
    result = call()
    return status("VmHWM") - before, result

with torch.no_grad():
    forward, _ = highest(lambda: model(x))
kernel, ntk = highest(lambda: empirical_ntk(model, x, route=plan, memory_budget=budget))
error = None
if budget:
    other = empirical_ntk(model, x)
    error = float((ntk - other).norm() / other.norm())
print(json.dumps({"forward": forward, "kernel": kernel, "error": error}))
"""


def measured(n, budget=""):
    tests = Path(__file__).parents[1]
    output = subprocess.run(
        [sys.executable, "-c", MEASURE, str(n), budget],
        env=os.environ | {"PYTHONPATH": str(tests)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return json.loads(output)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CLEAR.exists(), reason="needs Linux to tell its peak"),
]


def test_resnet_18_stays_within_its_budget():
    found = measured(16, "256MiB")
    assert found["kernel"] - found["forward"] < 256 * MIB
    assert found["error"] < 1e-6


def test_resnet_18_of_64_images_takes_a_seventh_of_its_jacobian():
    found = measured(64)
    assert found["kernel"] < 4096 * MIB  # J takes 28 GB

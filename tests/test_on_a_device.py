"""The models of users lie on devices that are not the CPU: nothing is mixed with it.

On a pretended device, see there, so that machines without any show it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

SCRIPT = Path(__file__).parent / "on_a_device.py"
ALONE = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # torch takes one kind of device
CASES = ["bilinear", "conv_transpose", "embedding", "resnet_train", "transformer"]


def output(folder, *words):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        cwd=folder,
        env=ALONE,
        timeout=500,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_kernels_are_those_of_the_cpu_and_stay_on_the_device(tmp_path):
    for case, found in output(tmp_path, *CASES).items():
        assert max(found["errors"].values()) < 1e-9, case
        assert found["moved"] == {}, case


def test_all_monitors_log_what_they_log_on_the_cpu(tmp_path):
    found = output(tmp_path)
    assert found["near"].keys() == found["far"].keys()
    assert len(found["near"]) > 200
    for tag, values in found["near"].items():
        np.testing.assert_allclose(
            found["far"][tag], values, rtol=1e-4, atol=1e-5, err_msg=tag
        )
    # Statistics and spectra, but no kernel (36×36), no Jacobian and no weights.
    assert max(found["moved"].values()) < 300


def test_mixing_would_be_seen(tmp_path):
    script = (
        "import torch; from pretend_device import *; register()\n"
        "with pretended(): torch.ones(2).to(DEVICE) + torch.ones(2)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=SCRIPT.parent,
        env=ALONE,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert "of tensors on pretend:0 and on the CPU" in done.stderr

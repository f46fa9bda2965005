"""`quietly` puts random numbers and the settings of the process back."""

# ruff: noqa: NPY002 (the legacy generator of NumPy is what data sets draw from)
import random

import guarded
import numpy.random
import pytest
import torch

from ntk_callbacks import quietly

model = guarded.model


def test_generators_of_python_numpy_and_torch_are_restored(model):
    def draw():
        return random.random(), numpy.random.rand(), torch.rand(1).item()

    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    expected = draw()
    random.setstate(states[0])
    numpy.random.set_state(states[1])
    torch.set_rng_state(states[2])
    with quietly(model):
        draw()
        random.seed(0)
        numpy.random.seed(0)
        torch.manual_seed(0)
        model.train()(torch.randn(5, 3))  # dropout draws
    assert draw() == expected


@pytest.fixture
def settings():
    """Process-wide settings; put back in case a test finds a leak."""
    yield
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = False
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("settings")
def test_default_dtype_is_restored(model):
    torch.set_default_dtype(torch.float64)
    with quietly(model):
        torch.set_default_dtype(torch.float32)
    assert torch.get_default_dtype() == torch.float64


@pytest.mark.usefixtures("settings")
def test_deterministic_flags_are_restored(model):
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = True
    with quietly(model):
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.benchmark
    assert not torch.backends.cudnn.deterministic


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_float32_precision_is_full_inside_and_restored(model, precision):
    torch.set_float32_matmul_precision(precision)
    own = torch.backends.cuda.matmul.allow_tf32
    with quietly(model):
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("medium")
    assert torch.get_float32_matmul_precision() == precision
    assert torch.backends.cuda.matmul.allow_tf32 == own


@pytest.mark.usefixtures("settings")
@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch < 2.9"
)
def test_precision_of_single_operators_is_restored(model):
    backends = torch.backends
    chosen = {
        backends.cuda.matmul: "ieee",
        backends.cudnn.conv: "tf32",
        backends.cudnn.rnn: "ieee",
        backends.mkldnn.matmul: "bf16",
        backends.mkldnn.conv: "none",
    }
    before = {operator: operator.fp32_precision for operator in chosen}
    own = backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    try:
        for operator, precision in chosen.items():
            operator.fp32_precision = precision
        with quietly(model):
            inside = {operator.fp32_precision for operator in chosen}
        after = {operator: operator.fp32_precision for operator in chosen}
    finally:
        for operator, precision in before.items():
            operator.fp32_precision = precision
    assert inside == {"ieee"}
    assert after == chosen
    # The older switches, which nobody can read while operators differ.
    assert (backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == own


def test_gradients_are_enabled_and_autocast_is_off_inside(model):
    with torch.no_grad(), quietly(model):
        assert torch.is_grad_enabled()
    with torch.inference_mode():
        with quietly(model):
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
            model(torch.randn(5, 3)).sum().backward()
        assert torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with quietly(model):
            assert not torch.is_autocast_enabled("cpu")
            assert model(torch.randn(5, 3)).dtype == torch.float32
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("check_nan", [True, False])
def test_anomaly_detection_is_off_inside_and_restored(model, check_nan):
    with torch.autograd.set_detect_anomaly(True, check_nan=check_nan):
        with quietly(model):
            assert not torch.is_anomaly_enabled()
        assert torch.is_anomaly_enabled()
        assert torch.is_anomaly_check_nan_enabled() is check_nan
    with quietly(model):
        torch.autograd.set_detect_anomaly(True)
    assert not torch.is_anomaly_enabled()


def test_gradient_mode_is_restored_whatever_happens_inside(model):
    with quietly(model):
        torch.set_grad_enabled(False)
    assert torch.is_grad_enabled()

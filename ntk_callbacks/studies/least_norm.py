"""Least-norm fits through the interpolation threshold: three models, many draws.

Each function draws a model with some number of parameters many times, fits the training
set by the solution of least norm, and returns test errors and spectra, draw by draw.
Spectra are those of the kernel that can be different from zero: of its n eigenvalues
the largest p, where there are only p parameters.
"""

import torch
from torch import Tensor

from ntk_callbacks import dynamics, metrics
from ntk_callbacks.engine.features import layer_features
from ntk_callbacks.engine.kernel import empirical_ntk
from ntk_callbacks.experiments.models import MLP
from ntk_callbacks.layout import as_matrix
from ntk_callbacks.studies.descent import descend
from ntk_callbacks.studies.study import Result
from ntk_callbacks.studies.tasks import centered_one_hot, digits

TEST_DIGITS = 300
"""Digits held out; their labels are right."""

_TARGETS_PER_DRAW = 10  # of isotropic inputs: they share a kernel


def isotropic(
    p: int, *, examples: int, draws: int, noise: float, device: str
) -> Result:
    """Linear regression y = x·β + ε on standard normal inputs, |β| = 1.

    Args:
        p: Parameters.
        examples: n.
        draws: Of the inputs.
        noise: σ², variance of ε.
        device: Where to compute.

    Returns:
        `errors`, |β̂ − β|² averaged over targets; `smallest` and `conditions` of XXᵀ/p
        (of XᵀX/n for fewer parameters).
    """
    errors, spectra = [], []
    for _ in range(draws):
        x = torch.randn(examples, p, device=device, dtype=torch.float64)
        beta = torch.randn(p, _TARGETS_PER_DRAW, device=device, dtype=torch.float64)
        beta /= beta.norm(dim=0)
        y = x @ beta
        y += noise**0.5 * torch.randn_like(y)
        kernel = x @ x.T
        # A kernel with the p unit vectors instead of test inputs gives β̂ itself.
        fitted = dynamics.kernel_regression(kernel, y, x.T)
        errors.append(float((fitted - beta).square().sum(0).mean()))
        spectra.append(_spectrum(kernel / max(examples, p), p))
    return {"errors": errors, **_columns(spectra)}


def random_features(
    p: int, *, examples: int, draws: int, flipped: float, device: str
) -> Result:
    """Digits from p random ReLU features, by the readout of least norm.

    Args:
        p: Features.
        examples: n.
        draws: Of the features and of the wrong labels.
        flipped: Share of the training labels that are wrong.
        device: Where to compute.

    Returns:
        `errors`, Σ (f − y)² over classes, averaged over test digits; `smallest` and
        `conditions` of the kernel ΦΦᵀ/max(n, p).
    """
    x, labels = digits(examples, device=device)
    x_test, labels_test = digits(TEST_DIGITS, held_out=True, device=device)
    x, x_test = x - x.mean(0), x_test - x.mean(0)  # a unit could be dead on the mean
    y_test = centered_one_hot(labels_test, 10, x)
    errors, spectra = [], []
    for _ in range(draws):
        model = MLP((x.shape[1],), 10, p, 1, "relu", "ntk", 2**0.5, 0.0).to(x)
        features, seen = layer_features(model, x), layer_features(model, x_test)
        kernel = features @ features.T
        y = centered_one_hot(wrong_labels(labels, 10, flipped), 10, x)
        fitted = dynamics.kernel_regression(kernel, y, seen @ features.T)
        errors.append(float((fitted - y_test).square().sum(1).mean()))
        spectra.append(_spectrum(kernel / max(examples, p), p))
    return {"errors": errors, **_columns(spectra)}


def small_network(
    width: int,
    *,
    inputs: int,
    examples: int,
    draws: int,
    flipped: float,
    steps: int,
    device: str,
) -> Result:
    """Odd or even digits by a two-layer network: its tangent kernel, and its training.

    f = Σ aᵢ erf(wᵢ·x)/√width without biases: (inputs + 1) · width parameters, none of
    them redundant. Inputs are fixed random projections of the pixels, since some pixels
    never change.

    Args:
        width: Hidden units.
        inputs: Entries of an input.
        examples: n.
        draws: Of the network and of the wrong labels.
        flipped: Share of the training labels that are wrong.
        steps: Of gradient descent.
        device: Where to compute.

    Returns:
        `errors`, mean (f − y)² on test digits of regression with the tangent kernel at
        the start, which is lazy training to its end; `trained`, those of the network
        after the steps; `smallest` and `conditions` of the kernel.
    """
    x, labels = digits(examples, device=device)
    x_test, labels_test = digits(TEST_DIGITS, held_out=True, device=device)
    chance = torch.Generator().manual_seed(0)
    projection = torch.linalg.qr(torch.randn(x.shape[1], inputs, generator=chance))[0]
    x, x_test = x @ projection.to(x), x_test @ projection.to(x)
    x, x_test = x / x.std(), x_test / x.std()
    y_test = _signs(labels_test % 2, x)
    found: dict[str, list[float]] = {"errors": [], "trained": []}
    spectra = []
    for _ in range(draws):
        y = _signs(wrong_labels(labels % 2, 2, flipped), x)
        model = MLP((inputs,), 1, width, 1, "erf", "ntk", 1.5, 0.0).to(x)
        kernel = as_matrix(empirical_ntk(model, x))
        with torch.no_grad():
            fitted = dynamics.kernel_regression(
                kernel,
                y,
                as_matrix(empirical_ntk(model, x_test, x)),
                f0=model(x),
                f0_test=model(x_test),
            )
        rate = 0.5 * float(dynamics.max_learning_rate(kernel))
        descend(model, x, y, learning_rate=rate, steps=steps)
        with torch.no_grad():
            trained = model(x_test)
        for name, outputs in (("errors", fitted), ("trained", trained)):
            found[name].append(float((outputs - y_test).square().mean()))
        spectra.append(_spectrum(kernel, width * (inputs + 1)))
    return {**found, **_columns(spectra)}


def wrong_labels(labels: Tensor, classes: int, share: float) -> Tensor:
    """Labels of which some are replaced by another class, each equally likely.

    Args:
        labels: (n,), of 0 … classes − 1.
        classes: How many there are.
        share: Probability of each label to be wrong.

    Returns:
        Labels (n,).
    """
    shift = torch.randint_like(labels, 1, classes)
    wrong = torch.rand(len(labels), device=labels.device) < share
    return torch.where(wrong, (labels + shift) % classes, labels)


def _signs(odd: Tensor, like: Tensor) -> Tensor:
    return (2 * odd[:, None] - 1).to(like)


def _spectrum(kernel: Tensor, p: int) -> tuple[float, float]:
    """The least eigenvalue that is not zero by the number of parameters, and λ₁/it."""
    values = dynamics.eigenmodes(kernel).eigenvalues[: min(len(kernel), p)]
    return float(values[-1]), float(metrics.condition_number(values))


def _columns(spectra: list[tuple[float, float]]) -> Result:
    smallest, conditions = zip(*spectra, strict=True)
    return {"smallest": list(smallest), "conditions": list(conditions)}

"""How the parameters of a layer enter it and how fast they learn."""

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

Parametrization: TypeAlias = Literal["ntk", "standard"]
"""Where 1/√fan_in enters: the forward pass, or the initial variance."""


@dataclass(frozen=True, slots=True)
class Learning:
    """How the parameters of a layer enter it, and how fast they learn.

    Args:
        parametrization: `"ntk"` or `"standard"`.
        fan_in: n, inputs of one unit; the standard parametrization needs it.
        bias: Whether there is a bias; None for one if σ_b > 0. It matters to the
            standard parametrization, where a bias that starts at 0 learns too.
        weight_rate: λ_W, learning rate of the weights relative to the others'.
        bias_rate: λ_b, learning rate of the bias.

    Raises:
        ValueError: If an argument is out of range, or `fan_in` is missing.

    Example:
        Rates that keep the standard parametrization finite, λ_W/n for the weights:

        >>> Learning("standard", fan_in=64, bias=True, weight_rate=1 / 64).weight_rate
        0.015625

    References:
        Sohl-Dickstein et al. (2020), arXiv:2001.07301 (parametrizations); Roberts,
        Yaida and Hanin (2021), arXiv:2106.10165 (the learning-rate tensor λ).
    """

    parametrization: Parametrization = "ntk"
    fan_in: int | None = None
    bias: bool | None = None
    weight_rate: float = 1.0
    bias_rate: float = 1.0

    def __post_init__(self) -> None:
        check_not_negative(weight_rate=self.weight_rate, bias_rate=self.bias_rate)
        check_choice(Parametrization, parametrization=self.parametrization)
        if self.parametrization == "standard" and (self.fan_in or 0) < 1:
            raise ValueError(
                f"fan_in is {self.fan_in}; the kernel of the standard parametrization "
                "grows with the width: give the number of inputs of one unit."
            )

    def gains(self, sigma_w: float, sigma_b: float) -> tuple[float, float]:
        """What the tangent kernel gains of weights, for each unit of K, and of a bias.

        Args:
            sigma_w: σ_w.
            sigma_b: σ_b.

        Returns:
            λ_W σ_w² and λ_b σ_b², or λ_W n and λ_b.

        Raises:
            ValueError: If there is to be a bias scale without a bias.
        """
        if self.bias is False and sigma_b:
            raise ValueError(f"sigma_b is {sigma_b} without a bias, expected 0.")
        if self.parametrization == "ntk":
            return self.weight_rate * sigma_w**2, self.bias_rate * sigma_b**2
        bias = sigma_b > 0 if self.bias is None else self.bias
        return self.weight_rate * (self.fan_in or 0), self.bias_rate * bias


def check_not_negative(**numbers: float) -> None:
    """Refuse a negative or infinite number, by its name.

    Args:
        **numbers: Name -> number.

    Raises:
        ValueError: If one is not in [0, ∞).
    """
    for name, number in numbers.items():
        if not 0 <= number < math.inf:
            raise ValueError(f"{name} is {number}, expected a number of at least 0.")


def check_choice(choices: Any, **choice: str) -> None:
    """Refuse a word that is not among the choices of a `Literal`.

    Args:
        choices: A `Literal`.
        **choice: Name of the argument -> what was given.

    Raises:
        ValueError: If it is none of them.
    """
    for name, given in choice.items():
        if given not in get_args(choices):
            raise ValueError(
                f"{name} is {given!r}, expected one of {', '.join(get_args(choices))}."
            )


def check_counts(**counts: int) -> None:
    """Refuse what is not a whole number of at least 1, by its name.

    Args:
        **counts: Name -> number.

    Raises:
        ValueError: If one is none.
    """
    for name, given in counts.items():
        if not isinstance(given, int) or isinstance(given, bool) or given < 1:
            raise ValueError(
                f"{name} is {given!r}, expected a whole number of at least 1."
            )


def check_depth(depth: int) -> None:
    """Refuse a depth that is not a whole number of at least 0.

    Args:
        depth: Number of layers or blocks.

    Raises:
        ValueError: If it is negative or not an integer.
    """
    if not isinstance(depth, int) or isinstance(depth, bool) or depth < 0:
        raise ValueError(f"depth is {depth!r}, expected a whole number of at least 0.")

"""What plain data can be known to be wrong for, and what is left to the callable."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import pytest
import torch

from ntk_callbacks.experiments.arguments import choices, wrong_arguments


def takes(annotation):
    def target(value): ...

    target.__annotations__["value"] = annotation
    return target


@pytest.mark.parametrize(
    ("annotation", "right", "wrong"),
    [
        (int, [3, -1], ["3", 2.5, True, [3]]),
        (float, [3, 2.5], ["abc", False]),
        (str, ["abc"], [3, True]),
        (bool, [True], [1, "yes"]),
        (Literal["a", "b"], ["a"], ["c", 1]),
        (int | None, [None, 3], ["abc"]),
        (float | torch.Tensor, [0.1], ["abc"]),
        (int | str, [3, "epoch"], [2.5]),
        (Path, ["a/b"], [3]),
        (tuple[float, float], [[0.9, 0.99]], [0.9]),
        (list[int], [[1]], ["1"]),
        (Callable[[int], int], [{"_target_": "f"}], []),
        (Any, [3, "abc", None, [1]], []),
        (torch.nn.Module, [{"_target_": "f"}, None], ["relu"]),
        ("NoSuchName", [3, "abc"], []),
    ],
    ids=str,
)
def test_values_are_compared_with_the_annotation(annotation, right, wrong):
    for value in right:
        assert wrong_arguments(takes(annotation), {"value": value}) == []
    for value in wrong:
        (sentence,) = wrong_arguments(takes(annotation), {"value": value})
        assert sentence.startswith(f"value is {value!r}, expected ")


def test_real_signatures_name_the_typo():
    (sentence,) = wrong_arguments(torch.optim.SGD, {"lr": 0.1, "momentun": 0.9})
    assert sentence.startswith("momentun does not exist; did you mean momentum? Valid:")
    (sentence,) = wrong_arguments(pl.Trainer, {"max_epochs": "ten"})
    assert sentence == "max_epochs is 'ten', expected int."


def test_a_target_that_takes_anything_is_not_second_guessed():
    assert wrong_arguments(lambda **kwargs: None, {"whatever": 1}) == []
    assert wrong_arguments(dict, {"whatever": 1}) == []


def test_choices_without_a_near_name():
    assert choices("zzz", ["cnn", "mlp"]) == ". Valid: cnn, mlp."

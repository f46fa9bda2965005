"""Checks that are made once for each function still check every call."""

import pytest
import torch
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor
from type_checks import checked

from ntk_callbacks.layout import symmetric_


def inner(annotation):
    @jaxtyped(typechecker=checked)
    def twice(x: annotation, y: annotation) -> annotation:
        return x + y

    return twice


def test_functions_inside_of_others_are_checked_by_their_own_signature():
    for _ in range(2):  # made, and found again
        vectors, matrices = inner(Float[Tensor, " n"]), inner(Float[Tensor, "n n"])
        assert torch.equal(vectors(torch.ones(3), torch.ones(3)), 2 * torch.ones(3))
        assert matrices(torch.eye(2), torch.eye(2)).shape == (2, 2)
        for function, x, y in [
            (vectors, torch.ones(3), torch.ones(2)),
            (vectors, torch.eye(2), torch.eye(2)),
            (matrices, torch.ones(2), torch.ones(2)),
            (matrices, torch.ones(2, 3), torch.ones(2, 3)),
        ]:
            with pytest.raises(TypeCheckError):
                function(x, y)


def test_the_package_is_checked():
    with pytest.raises(TypeCheckError):
        symmetric_("no kernel")

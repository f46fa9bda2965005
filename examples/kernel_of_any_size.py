"""What a kernel costs, and what to do when it is too large to form.

First a small transformer on scikit-learn's digits, read row by row as sequences: the
plan says how each weight is contracted and what that takes. Then a language model whose
outputs are the logits of every position: its kernel of 8 sentences would have 16
billion entries, but its largest eigenvalues, its trace and its spectrum need only
products with it.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ntk_callbacks import (
    TangentOperator,
    empirical_ntk,
    plan_ntk,
    spectral_density,
    top_eigenpairs,
    trace_estimate,
)


class Reader(nn.Module):
    """One layer of attention over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)).mean(1))


def main(fast: bool) -> None:
    """Plan, measure, and then measure without a matrix."""
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images / 16).float()[: 16 if fast else 64]
    reader = Reader().eval()
    plan = plan_ntk(reader, images)
    print(plan)
    ntk = empirical_ntk(reader, images, route=plan)
    print("kernel:", tuple(ntk.shape))

    words, length = 1000, 2 if fast else 16
    sentences = torch.randint(words, (2 if fast else 8, length))
    model = nn.Sequential(nn.Embedding(words, 32), nn.GELU(), nn.Linear(32, words))
    operator = TangentOperator(model, sentences)
    print(f"\nJ of the language model: {operator.shape[0]} × {operator.shape[1]}")
    pairs = top_eigenpairs(operator, 3)
    values = ", ".join(f"{value:.4g}" for value in pairs.eigenvalues)
    print(f"largest eigenvalues {values}; residuals {pairs.residuals.max():.1e}")
    trace = trace_estimate(operator, samples=16)
    print(f"trace {trace.value:.5g} ± {trace.standard_error:.2g}")
    found = spectral_density(operator, samples=2, steps=20)
    half = found.weights[found.nodes > pairs.eigenvalues[0] / 2].sum()
    print(f"share of the eigenvalues above half of the largest: {half:.2%}")


if __name__ == "__main__":
    main(fast="--fast" in sys.argv[1:])

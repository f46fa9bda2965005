"""Times the routes of `empirical_ntk` beside the usual ways to write the kernel.

All peers of a case run in turn in this one process, several rounds, so that a slow
moment of the machine hits each of them; the table gives medians and their ratios.

    python tests/bench/kernels.py [--rounds 5]
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from ntk_callbacks import as_matrix, empirical_ntk
from ntk_callbacks.experiments.models import CNN, MLP, ResNet


def row_loop(model: nn.Module, x: Tensor) -> Tensor:
    """J row by row with plain autograd, then J Jᵀ."""
    params = list(model.parameters())
    rows = []
    for example in x:
        for output in model(example[None]).flatten():
            gradients = torch.autograd.grad(output, params, retain_graph=True)
            rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    jacobian = torch.stack(rows)
    return jacobian @ jacobian.mT


def tutorial(model: nn.Module, x: Tensor) -> Tensor:
    """The recipe of the torch.func tutorial: vmap(jacrev), then einsum."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def single(params: dict[str, Tensor], example: Tensor) -> Tensor:
        return functional_call(model, params, (example[None],)).squeeze(0)

    parts = vmap(jacrev(single), (None, 0))(params, x)
    blocks = [part.flatten(2) for part in parts.values()]
    return as_matrix(sum(torch.einsum("ncp,mdp->nmcd", j, j) for j in blocks))


PEERS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    'route="auto"': lambda model, x: as_matrix(empirical_ntk(model, x)),
    'route="vmap"': lambda model, x: as_matrix(empirical_ntk(model, x, route="vmap")),
    'route="rows"': lambda model, x: as_matrix(empirical_ntk(model, x, route="rows")),
    "row loop": row_loop,
    "tutorial recipe": tutorial,
}

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 64-3×256-10, N=64": (
        lambda: MLP((1, 8, 8), 10, width=256, depth=3),
        (64, 1, 8, 8),
    ),
    "CNN width 32, N=32": (
        lambda: CNN((3, 32, 32), 10, width=32, depth=3),
        (32, 3, 32, 32),
    ),
    "ResNet width 16, N=16": (
        lambda: ResNet((3, 32, 32), 10, width=16),
        (16, 3, 32, 32),
    ),
}


def main() -> None:
    """Print one table for each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    for case, (factory, shape) in CASES.items():
        torch.manual_seed(0)
        model, x = factory().eval(), torch.randn(shape)
        exact = row_loop(copy.deepcopy(model).double(), x.double())
        seconds: dict[str, list[float]] = {name: [] for name in PEERS}
        errors = {}
        for _ in range(rounds + 1):
            for name, peer in PEERS.items():
                start = time.perf_counter()
                kernel = peer(model, x)
                seconds[name].append(time.perf_counter() - start)
                errors[name] = float((kernel - exact).norm() / exact.norm())
        medians = {
            n: statistics.median(s[1:]) for n, s in seconds.items()
        }  # 1st: warm-up
        best = min(medians["row loop"], medians["tutorial recipe"])
        print(f"\n{case} ({rounds} rounds, float32, {torch.get_num_threads()} threads)")
        print(f"{'peer':<18}{'seconds':>9}{'/ best rival':>14}{'error':>10}")
        for name, median in medians.items():
            print(
                f"{name:<18}{median:>9.3f}{median / best:>14.2f}{errors[name]:>10.1e}"
            )


if __name__ == "__main__":
    main()

"""What is measured: the cases, and the peers that compute the same kernel.

Knows no framework: the parent process and every worker read it, whichever environment
they run in.
"""

from dataclasses import dataclass
from typing import Literal

SHAPES: dict[str, tuple[int, ...]] = {
    "mlp": (784,),
    "cnn": (3, 32, 32),
    "resnet": (3, 32, 32),
    "vit": (3, 32, 32),
    "small_cnn": (3, 16, 16),
}
"""Network -> shape of one input."""

TITLES = {
    "mlp": "MLP 784-4×1024-10",
    "cnn": "CNN 3×32×32, channels 64-64-128-128-256",
    "resnet": "ResNet-18 for 3×32×32",
    "vit": "ViT, 65 tokens, width 128, depth 4",
}


@dataclass(frozen=True)
class Case:
    """A network and the size of its kernel.

    Args:
        network: A key of `SHAPES`.
        n: Number of examples.
        outputs: Number of outputs c.
        width: Width of the hidden layers; None for that in the network's title.
    """

    network: str
    n: int
    outputs: int = 10
    width: int | None = None

    @property
    def checked(self) -> list[int]:
        """Examples whose block of the kernel is compared with float64."""
        return sorted({0, 1, self.n - 2, self.n - 1})


CASES = {
    "mlp64": Case("mlp", 64),
    "mlp256": Case("mlp", 256),
    "cnn32": Case("cnn", 32),
    "cnn64": Case("cnn", 64),
    "resnet16": Case("resnet", 16),
    "resnet32": Case("resnet", 32),
    "resnet64": Case("resnet", 64),
    "vit16": Case("vit", 16),
    "vit64": Case("vit", 64),
}


@dataclass(frozen=True)
class Peer:
    """A way to compute the kernel.

    Args:
        label: Its name in the tables.
        kind: Whose it is: `"ours"`, `"variant"` (ours too, but another quantity or
            with the planning in it), `"pytorch"`, `"jax"`, or the `"floor"`.
        requires: Module it needs; where it cannot be imported the peer is left out.
        dense: Whether it holds the whole Jacobian.
        outputs: The kernel it computes, as in `empirical_ntk`.
        only: Cases it is measured on; None for all.
    """

    label: str
    kind: Literal["ours", "variant", "pytorch", "jax", "floor"]
    requires: str = "torch"
    dense: bool = False
    outputs: Literal["full", "trace", "diagonal", "pseudo"] = "full"
    only: tuple[str, ...] | None = None

    @property
    def is_rival(self) -> bool:
        """Whether others wrote it."""
        return self.kind in {"pytorch", "jax"}


PEERS = {
    "ours": Peer("ours", "ours", "ntk_callbacks"),
    "cold": Peer("ours, planning included", "variant", "ntk_callbacks"),
    "trace": Peer(
        "ours, traced", "variant", "ntk_callbacks", outputs="trace", only=("cnn32",)
    ),
    "diagonal": Peer(
        "ours, diagonal",
        "variant",
        "ntk_callbacks",
        outputs="diagonal",
        only=("cnn32",),
    ),
    "pseudo": Peer(
        "ours, pseudo", "variant", "ntk_callbacks", outputs="pseudo", only=("cnn32",)
    ),
    "rows": Peer("row loop", "pytorch", dense=True),
    "recipe": Peer("vmap(jacrev)", "pytorch", dense=True),
    "nngeometry": Peer("nngeometry", "pytorch", "nngeometry"),
    "curvlinops": Peer("curvlinops", "pytorch", "curvlinops", dense=True),
    "nt3": Peer("neural-tangents, structured", "jax", "neural_tangents"),
    "nt1": Peer("neural-tangents, Jacobian", "jax", "neural_tangents", dense=True),
    "floor": Peer("floor", "floor"),
}
"""Key -> peer, in the order of the tables."""

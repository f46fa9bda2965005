"""neural-tangents on the same networks, weights and inputs.

Dense weights are stored as (in, out): a transpose in the network hides the layer from
its structured derivatives, which then take the time of the Jacobian. Images are NHWC.
Batch normalization is the affine map it is in evaluation mode.
"""

import os
from collections.abc import Callable
from typing import Any

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # before jax is imported

Built = tuple[Callable[[], Any], dict[str, Any]]
Arrays = dict[str, Any]


def _convolve(params: Arrays, name: str, x: Any, stride: int, padding: int) -> Any:
    from jax import lax

    y = lax.conv_general_dilated(
        x,
        params[f"{name}.weight"],
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "OIHW", "NHWC"),
    )
    return y + params[f"{name}.bias"] if f"{name}.bias" in params else y


def _linear(params: Arrays, name: str, x: Any) -> Any:
    return x @ params[f"{name}.weight"] + params[f"{name}.bias"]


def _relu(x: Any) -> Any:
    import jax.numpy as jnp

    return jnp.maximum(x, 0)


def mlp(params: Arrays, x: Any, constants: Arrays) -> Any:
    """As `models.mlp`."""
    for i in range(0, 8, 2):
        x = _relu(_linear(params, str(i), x))
    return _linear(params, "8", x)


def cnn(params: Arrays, x: Any, constants: Arrays) -> Any:
    """As `models.cnn`."""
    x = x.transpose(0, 2, 3, 1)
    for i, stride in zip(range(0, 10, 2), (1, 1, 2, 1, 2), strict=True):
        x = _relu(_convolve(params, str(i), x, stride, 1))
    return _linear(params, "12", x.mean((1, 2)))


def resnet(params: Arrays, x: Any, constants: Arrays) -> Any:
    """As `models.resnet`; the running statistics are constants."""

    def normalize(name: str, x: Any) -> Any:
        mean, variance = (constants[f"{name}.running_{k}"] for k in ("mean", "var"))
        x = (x - mean) / (variance + 1e-5) ** 0.5
        return x * params[f"{name}.weight"] + params[f"{name}.bias"]

    x = _relu(normalize("1", _convolve(params, "0", x.transpose(0, 2, 3, 1), 1, 1)))
    for block in range(3, 11):
        name, stride = str(block), 2 if block in {5, 7, 9} else 1
        h = _convolve(params, f"{name}.conv1", x, stride, 1)
        h = _relu(normalize(f"{name}.norm1", h))
        h = normalize(f"{name}.norm2", _convolve(params, f"{name}.conv2", h, 1, 1))
        if f"{name}.shortcut.0.weight" in params:
            x = _convolve(params, f"{name}.shortcut.0", x, stride, 0)
            x = normalize(f"{name}.shortcut.1", x)
        x = _relu(h + x)
    return _linear(params, "13", x.mean((1, 2)))


def vit(params: Arrays, x: Any, constants: Arrays) -> Any:
    """As `models.vit`."""
    import jax
    import jax.numpy as jnp

    heads = 4

    def normalize(name: str, x: Any) -> Any:
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred**2).mean(-1, keepdims=True)
        x = centred / jnp.sqrt(variance + 1e-5)
        return x * params[f"{name}.weight"] + params[f"{name}.bias"]

    x = _convolve(params, "patches", x.transpose(0, 2, 3, 1), 4, 0)
    n, width = len(x), x.shape[-1]
    token = jnp.broadcast_to(params["token"], (n, 1, width))
    x = jnp.concatenate([token, x.reshape(n, -1, width)], 1) + params["positions"]
    for block in range(4):
        name = f"blocks.{block}"
        qkv = _linear(params, f"{name}.qkv", normalize(f"{name}.norm1", x))
        split = qkv.reshape(n, -1, 3, heads, width // heads)
        q, k, v = jnp.moveaxis(split, (2, 3), (0, 2))
        scores = jnp.einsum("nhtd,nhsd->nhts", q, k) * (width // heads) ** -0.5
        mixed = jnp.einsum("nhts,nhsd->nthd", jax.nn.softmax(scores, -1), v)
        x = x + _linear(params, f"{name}.out", mixed.reshape(n, -1, width))
        h = _linear(params, f"{name}.up", normalize(f"{name}.norm2", x))
        x = x + _linear(params, f"{name}.down", jax.nn.gelu(h, approximate=False))
    return _linear(params, "head", normalize("norm", x)[:, 0])


NETWORKS = {"mlp": mlp, "cnn": cnn, "resnet": resnet, "vit": vit}


def build(network: str, weights: Arrays, x: Any, implementation: int) -> Built:
    """The compiled kernel function: compilation is no part of what is timed later.

    Args:
        network: A key of `NETWORKS`.
        weights: State of the PyTorch network as NumPy arrays.
        x: Inputs as PyTorch has them, (n, ...).
        implementation: 1 contracts Jacobians, 3 uses structured derivatives.
    """
    import jax
    import neural_tangents

    constants = {k: v for k, v in weights.items() if ".running_" in k}
    params = {
        k: jax.numpy.asarray(v.T if v.ndim == 2 else v)
        for k, v in weights.items()
        if k not in constants and not k.endswith("num_batches_tracked")
    }
    constants = {k: jax.numpy.asarray(v) for k, v in constants.items()}
    kernel = neural_tangents.empirical_ntk_fn(
        lambda params, x: NETWORKS[network](params, x, constants),
        trace_axes=(),
        vmap_axes=0,
        implementation=implementation,
    )
    x = jax.numpy.asarray(x)
    compiled = jax.jit(lambda x, params: kernel(x, None, params)).lower(x, params)
    compiled = compiled.compile()
    return lambda: jax.block_until_ready(compiled(x, params)), {}

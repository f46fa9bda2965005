"""The networks every route must get right: small enough for the loop, and odd."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from networks import (
    Computed,
    around,
    attention,
    batchnorm_frozen,
    convolution,
    cross_attention,
    embedding,
    images,
    language_model,
    mlp,
    named,
    packed_sequences,
    pairs,
    recurrent,
    resnet,
    sequences,
    settled,
    tokens,
    transformer,
    vectors,
)
from odd_networks import (
    Cube,
    branching,
    called_twice,
    checkpointed,
    class_token,
    compiled,
    frozen_layer,
    hooked,
    keyword_inputs,
    overwriting,
    parameter_list,
    plain_time_derivative,
    returning,
    time_derivative,
    two_inputs,
    unused_parameter,
    used_directly,
)
from oracles import call, each
from torch import Tensor, nn
from torch.nn.utils import parametrizations


@dataclass(frozen=True)
class Case:
    """A network small enough for the oracle, and the inputs to probe it with."""

    id: str
    model: Callable[[], nn.Module]
    probe: Callable[[], Any]
    mode: str = "eval"
    output_fn: Callable[[nn.Module, Any], Tensor] = call
    vmap: bool = True
    """Whether `torch.func` can differentiate it one example at a time."""

    def build(self) -> tuple[nn.Module, Any]:
        """Network and inputs in float64, the network in the mode it is measured in."""
        torch.manual_seed(0)
        model = self.model().double().train(self.mode == "train")
        return model, each(in_double, self.probe())


def in_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


CASES = [
    Case("linear", lambda: nn.Linear(5, 2), vectors),
    Case("mlp", mlp, vectors),
    Case("mlp_no_bias", lambda: mlp(bias=False), vectors),
    Case("mlp_single_output", lambda: returning(lambda y: y[:, 0]), vectors),
    Case("mlp_on_sequences", lambda: nn.Linear(6, 2), sequences),
    Case("relu_inplace", lambda: mlp(partial(nn.ReLU, inplace=True)), vectors),
    Case("input_overwritten", overwriting, vectors),
    Case("prelu", lambda: mlp(nn.PReLU), vectors, vmap=False),
    Case("bilinear", lambda: nn.Bilinear(5, 4, 2), pairs),
    Case("cnn", lambda: convolution(nn.ReLU()), images),
    Case("max_pool", lambda: convolution(nn.MaxPool2d(2), features=16), images),
    Case(
        "conv_grouped_dilated",
        lambda: convolution(
            nn.Conv2d(4, 6, 2, dilation=2, groups=2), nn.ReLU(), features=54
        ),
        images,
    ),
    Case(
        "conv_depthwise_strided",
        lambda: convolution(nn.Conv2d(4, 4, 3, 2, groups=4), nn.Tanh(), features=16),
        images,
    ),
    Case(
        "conv_reflect",
        lambda: convolution(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
        images,
    ),
    Case(
        "conv_transpose",
        lambda: convolution(
            nn.ConvTranspose2d(4, 2, 3, 2, output_padding=1), features=288
        ),
        images,
    ),
    Case(
        "conv_1d",
        lambda: nn.Sequential(nn.Conv1d(4, 3, 3), nn.Tanh(), nn.Conv1d(3, 2, 3)),
        sequences,
    ),
    Case("layer_norm", lambda: around(nn.LayerNorm(6), 6), vectors),
    Case(
        "layer_norm_on_sequences",
        lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 1)),
        sequences,
    ),
    Case("rms_norm", lambda: around(nn.RMSNorm(6), 6), vectors),
    Case("group_norm", lambda: convolution(nn.GroupNorm(2, 4), nn.ReLU()), images),
    Case(
        "instance_norm",
        lambda: convolution(nn.InstanceNorm2d(4, affine=True), nn.ReLU()),
        images,
    ),
    Case("batch_norm", lambda: settled(around(nn.BatchNorm1d(6), 6)), vectors),
    Case("resnet", resnet, images),
    Case("resnet_train", resnet, images, mode="train", vmap=False),
    Case("batch_norm_frozen_train", batchnorm_frozen, vectors, "train", vmap=False),
    # Without running statistics, BatchNorm uses those of the batch in eval mode too.
    Case(
        "batch_norm_untracked",
        lambda: settled(around(nn.BatchNorm1d(6, track_running_stats=False), 6)),
        vectors,
        vmap=False,
    ),
    Case(
        "batch_norm_untracked_images",
        lambda: settled(
            convolution(nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU())
        ),
        images,
        vmap=False,
    ),
    Case("lstm", lambda: recurrent(nn.LSTM), sequences, vmap=False),
    Case(
        "lstm_bidirectional",
        lambda: recurrent(nn.LSTM, num_layers=2, bidirectional=True, proj_size=3),
        sequences,
        vmap=False,
    ),
    Case("gru", lambda: recurrent(nn.GRU), sequences, vmap=False),
    Case("rnn", lambda: recurrent(nn.RNN), sequences, vmap=False),
    Case("packed_sequences", packed_sequences, sequences, vmap=False),
    Case("attention", attention, sequences),
    Case("attention_no_bias", lambda: attention(bias=False), sequences),
    Case("attention_cross", cross_attention, sequences),
    Case("transformer", transformer, sequences),
    Case("transformer_norm_first", lambda: transformer(True), sequences),
    Case("embedding", embedding, tokens),
    Case("embedding_padding", lambda: embedding(padding_idx=2), tokens),
    Case("embedding_sparse", lambda: embedding(sparse=True), tokens, vmap=False),
    Case("tied_weights", language_model, tokens),
    Case("called_twice", called_twice, vectors),
    Case("used_directly", used_directly, vectors),
    Case("bare_parameters", class_token, sequences, vmap=False),
    Case("parameter_list", parameter_list, vectors),
    Case("frozen_layer", frozen_layer, vectors),
    Case("unused_parameter", unused_parameter, vectors),
    Case("checkpoint", lambda: checkpointed(False), vectors, vmap=False),
    Case("checkpoint_reentrant", lambda: checkpointed(True), vectors, vmap=False),
    Case("weight_norm", lambda: parametrizations.weight_norm(nn.Linear(5, 2)), vectors),
    Case(
        "spectral_norm",
        lambda: parametrizations.spectral_norm(nn.Linear(5, 2)),
        vectors,
    ),
    Case(
        "spectral_norm_train",
        lambda: parametrizations.spectral_norm(nn.Linear(5, 2)),
        vectors,
        mode="train",
        vmap=False,
    ),
    Case("orthogonal", lambda: parametrizations.orthogonal(nn.Linear(5, 2)), vectors),
    Case(
        "old_style_function",
        lambda: nn.Sequential(
            nn.Linear(5, 6), Computed(lambda _, x: Cube.apply(x)), nn.Linear(6, 2)
        ),
        vectors,
        vmap=False,
    ),
    Case("branching", branching, vectors, vmap=False),
    Case("hook_reads_item", hooked, vectors, vmap=False),
    Case("compiled_eager", lambda: compiled("eager"), vectors),
    Case("compiled_aot", lambda: compiled("aot_eager"), vectors),
    Case("tuple_inputs", two_inputs, pairs),
    Case("dict_inputs", keyword_inputs, named),
    Case(
        "dict_outputs",
        lambda: returning(lambda y: {"logits": y, "features": y**2}),
        vectors,
        output_fn=lambda model, x: model(x)["logits"],
    ),
    Case("derivative_outputs", mlp, vectors, output_fn=time_derivative, vmap=False),
    Case(
        "plain_derivative_outputs",
        mlp,
        vectors,
        output_fn=plain_time_derivative,
        vmap=False,
    ),
]

BY_ID = {case.id: case for case in CASES}

UNWRAPPED_OUTPUTS = {
    "logits": lambda y: {"logits": y, "features": y**2},
    "only_tensor": lambda y: {"scores": y, "loss": None},
    "tuple_of_one": lambda y: (y, None),
    "namespace": lambda y: SimpleNamespace(logits=y, hidden=y),
}
"""Results of `forward` that stand for one tensor."""

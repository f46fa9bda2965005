"""Language models as they are written in `transformers` and `peft`, two blocks deep."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from cases import Case
from torch import Tensor, nn
from torch.nn import functional
from zoo_vision import awake

VOCABULARY = 11
WIDTH = 8
HEADS = 2


def ids(n: int = 3, length: int = 5) -> Tensor:
    return torch.randint(0, VOCABULARY, (n, length))


def masked_ids(n: int = 3) -> dict[str, Tensor]:
    lengths = torch.tensor([5, 3, 4])
    return {
        "input_ids": ids(n),
        "attention_mask": (torch.arange(5) < lengths[:n, None]).long(),
        "token_type_ids": (torch.arange(5) >= torch.tensor([2, 1, 3])[:n, None]).long(),
    }


def translation(n: int = 3) -> dict[str, Tensor]:
    return {"input_ids": ids(n), "decoder_input_ids": ids(n, 3)}


def split_heads(x: Tensor, heads: int = HEADS) -> Tensor:
    n, time, _ = x.shape
    return x.view(n, time, heads, -1).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class Conv1D(nn.Module):
    """The linear layer of GPT-2, its weight stored as (in, out)."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(before, after))
        self.bias = nn.Parameter(torch.zeros(after))

    def forward(self, x: Tensor) -> Tensor:
        size = (*x.shape[:-1], self.weight.shape[1])
        x = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return x.view(size)


class GPTBlock(nn.Module):
    def __init__(self, linear: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.c_attn, self.c_proj = linear(WIDTH, 3 * WIDTH), linear(WIDTH, WIDTH)
        self.up, self.down = linear(WIDTH, 4 * WIDTH), linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(split_heads, self.c_attn(self.ln_1(x)).split(WIDTH, 2))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.c_proj(merge_heads(y)))
        y = self.down(functional.gelu(self.up(self.ln_2(x)), approximate="tanh"))
        return x + self.dropout(y)


class GPT(nn.Module):
    def __init__(self, linear: Callable[[int, int], nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, WIDTH)
        self.wpe = nn.Embedding(6, WIDTH)
        self.blocks = nn.ModuleList(GPTBlock(linear) for _ in range(2))
        self.ln_f = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, idx: Tensor) -> Tensor:
        position = torch.arange(idx.shape[1], device=idx.device)
        x = self.wte(idx) + self.wpe(position)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class BERTLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.value, self.dense = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.intermediate = nn.Linear(WIDTH, 2 * WIDTH)
        self.output = nn.Linear(2 * WIDTH, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (split_heads(f(x)) for f in (self.query, self.key, self.value))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
        weights = self.dropout(functional.softmax(scores + mask, dim=-1))
        y = self.dense(merge_heads(torch.matmul(weights, v)))
        x = self.norm1(self.dropout(y) + x)
        y = self.output(functional.gelu(self.intermediate(x)))
        return self.norm2(self.dropout(y) + x)


class BERT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.positions = nn.Embedding(6, WIDTH)
        self.types = nn.Embedding(2, WIDTH)
        self.register_buffer("position_ids", torch.arange(6)[None])
        self.norm = nn.LayerNorm(WIDTH, eps=1e-12)
        self.layers = nn.ModuleList(BERTLayer() for _ in range(2))
        self.pooler, self.classifier = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
    ) -> Tensor:
        x = self.words(input_ids) + self.types(token_type_ids)
        x += self.positions(self.position_ids[:, : input_ids.shape[1]])
        x = self.norm(x)
        mask = attention_mask[:, None, None, :].to(x.dtype)
        mask = (1.0 - mask) * torch.finfo(x.dtype).min
        for layer in self.layers:
            x = layer(x, mask)
        return self.classifier(torch.tanh(self.pooler(x[:, 0])))


class RMSNorm(nn.Module):
    """T5's and Llama's: no mean is subtracted, no bias is added."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + 1e-6))


def bucket(distance: Tensor, both_sides: bool, buckets: int = 8) -> Tensor:
    """T5's buckets: exact for near positions, logarithmic for far ones."""
    offset: Tensor | int = 0
    if both_sides:
        buckets //= 2
        offset = (distance > 0).long() * buckets
        distance = distance.abs()
    else:
        distance = -distance.clamp(max=0)
    exact = buckets // 2
    scale = (buckets - exact) / math.log(16 / exact)
    far = exact + ((distance.clamp(min=1) / exact).log() * scale).long()
    return offset + torch.where(distance < exact, distance, far.clamp(max=buckets - 1))


class T5Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (
            nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor, memory: Tensor, bias: Tensor | float) -> Tensor:
        q = split_heads(self.q(x))
        k, v = split_heads(self.k(memory)), split_heads(self.v(memory))
        scores = torch.matmul(q, k.transpose(3, 2))
        scores += bias
        return self.o(merge_heads(torch.matmul(scores.softmax(-1), v)))


class T5Block(nn.Module):
    def __init__(self, decoder: bool) -> None:
        super().__init__()
        self.attention, self.norm1 = T5Attention(), RMSNorm()
        if decoder:
            self.cross, self.norm2 = T5Attention(), RMSNorm()
        self.wi = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.wo = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.norm3 = RMSNorm()

    def forward(self, x: Tensor, bias: Tensor, memory: Tensor | None) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, bias)
        if memory is not None:
            x = x + self.cross(self.norm2(x), memory, 0.0)
        return x + self.wo(torch.relu(self.wi(self.norm3(x))))


class T5Stack(nn.Module):
    def __init__(self, embed: nn.Embedding, decoder: bool) -> None:
        super().__init__()
        self.embed = embed
        self.decoder = decoder
        self.relative_attention_bias = nn.Embedding(8, HEADS)
        self.blocks = nn.ModuleList(T5Block(decoder) for _ in range(2))
        self.final_norm = RMSNorm()

    def forward(self, tokens: Tensor, memory: Tensor | None = None) -> Tensor:
        x = self.embed(tokens)
        position = torch.arange(tokens.shape[1])
        distance = position[None, :] - position[:, None]
        buckets = bucket(distance, both_sides=not self.decoder)
        bias = self.relative_attention_bias(buckets).permute([2, 0, 1]).unsqueeze(0)
        if self.decoder:
            bias = bias.masked_fill(distance > 0, torch.finfo(x.dtype).min)
        for block in self.blocks:
            x = block(x, bias, memory)
        return self.final_norm(x)


class T5(nn.Module):
    """Encoder and decoder with one table of embeddings, which is also the readout."""

    def __init__(self, shared_module: bool) -> None:
        super().__init__()
        self.shared = nn.Embedding(VOCABULARY, WIDTH)
        self.encoder = T5Stack(self.shared, decoder=False)
        self.decoder = T5Stack(self.shared, decoder=True)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.shared.weight
        if not shared_module:  # three modules with one weight, not one module
            for stack in (self.encoder, self.decoder):
                stack.embed = nn.Embedding(VOCABULARY, WIDTH)
                stack.embed.weight = self.shared.weight

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        x = self.decoder(decoder_input_ids, self.encoder(input_ids))
        return self.lm_head(x * WIDTH**-0.5)


class LlamaLayer(nn.Module):
    """Four heads that share two keys and values."""

    def __init__(self) -> None:
        super().__init__()
        linear = partial(nn.Linear, bias=False)
        self.q_proj, self.o_proj = linear(WIDTH, 2 * WIDTH), linear(2 * WIDTH, WIDTH)
        self.k_proj, self.v_proj = linear(WIDTH, WIDTH), linear(WIDTH, WIDTH)
        self.gate_proj, self.up_proj = linear(WIDTH, 12), linear(WIDTH, 12)
        self.down_proj = linear(12, WIDTH)
        self.input_norm, self.post_norm = RMSNorm(), RMSNorm()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = self.input_norm(x)
        q, k = split_heads(self.q_proj(y), 4), split_heads(self.k_proj(y))
        q, k = (part * cos + self.rotate_half(part) * sin for part in (q, k))
        k, v = map(self.repeat_kv, (k, split_heads(self.v_proj(y))))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(merge_heads(y))
        y = self.post_norm(x)
        return x + self.down_proj(functional.silu(self.gate_proj(y)) * self.up_proj(y))

    @staticmethod
    def rotate_half(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return torch.cat((-x[..., half:], x[..., :half]), dim=-1)

    @staticmethod
    def repeat_kv(x: Tensor) -> Tensor:
        n, heads, time, width = x.shape
        return (
            x[:, :, None].expand(n, heads, 2, time, width).reshape(n, -1, time, width)
        )


class Llama(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(LlamaLayer() for _ in range(2))
        self.norm = RMSNorm()
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        inv_freq = 10.0 ** -torch.arange(0, 1, 2 / (WIDTH // HEADS))
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        position = torch.arange(input_ids.shape[1], dtype=self.inv_freq.dtype)
        angle = torch.outer(position, self.inv_freq)
        angle = torch.cat((angle, angle), dim=-1)
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, angle.cos(), angle.sin())
        return self.lm_head(self.norm(x)[:, -1])


def last(model: nn.Module, x: Any) -> Tensor:
    """Logits after the last token."""
    return (model(**x) if isinstance(x, dict) else model(x))[:, -1]


def few(model: nn.Module, x: Any) -> Tensor:
    """Two logits after every token."""
    return model(x)[:, :, :2]


LANGUAGE = [
    Case("gpt", lambda: awake(GPT()), ids, output_fn=last),
    Case("gpt_all_positions", lambda: awake(GPT()), ids, output_fn=few),
    Case("gpt_conv1d", lambda: awake(GPT(Conv1D)), ids, output_fn=last),
    Case("bert", lambda: awake(BERT()), masked_ids),
    Case("t5", lambda: awake(T5(False)), translation, output_fn=last),
    Case("llama", lambda: awake(Llama()), ids),
    # One module under three names, and its weight tied to another module's.
    Case("t5_shared_module", lambda: awake(T5(True)), translation, output_fn=last),
]

"""BLOOM: ALiBi instead of positions, a norm after the embedding, queries, keys and values interleaved by head."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.bloom.modeling_bloom import BloomBlock

from worker.architectures.base import Architecture
from worker.blocks import StepContext


class PagedBloomAttention(nn.Module):
    """BLOOM's attention over the paged cache; transformers' own attention interface does not reach it."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.query_key_value, self.dense = original.query_key_value, original.dense
        self.block, self.num_heads, self.scale = original.layer_idx, original.num_heads, original.inv_norm_factor
        self.register_buffer("slopes", alibi_slopes(self.num_heads), persistent=False)
        self.slopes: Tensor

    def forward(self, hidden: Tensor, residual: Tensor, *, layer_past: StepContext, **_: object) -> tuple[Tensor, None]:
        """Map `[1, num_tokens, hidden_size]`; `layer_past` is the one argument that a BloomBlock hands down."""
        query, key, value = self.query_key_value(hidden)[0].unflatten(-1, (self.num_heads, 3, -1)).unbind(2)
        out = layer_past.attend(self.block, query, key, value, scale=self.scale, alibi_slopes=self.slopes)
        return residual + self.dense(out.flatten(1).unsqueeze(0)), None


class NormedEmbedding(nn.Module):
    """Normalizes the embedding rows."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.word_embeddings_layernorm = nn.LayerNorm(hidden_size, eps=eps)

    def forward(self, rows: Tensor, positions: Tensor) -> Tensor:  # noqa: ARG002 - one signature for all families
        """Map embedding rows `[num_tokens, hidden_size]` to hidden states of the same shape."""
        out: Tensor = self.word_embeddings_layernorm(rows)
        return out


class Bloom(Architecture):
    """See the module."""

    block_class = BloomBlock
    norm_epsilon = "layer_norm_epsilon"
    activation = "mlp.gelu_impl"
    prefix = "transformer."
    blocks_key = "h."
    embedding_key = "word_embeddings.weight"
    norm_key = "ln_f."

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        config.slow_but_exact = False  # a detour around the linear layers that loses their biases

    def adapt_block(self, block: Any) -> None:
        block.self_attention = PagedBloomAttention(block.self_attention)
        block.mlp.gelu_impl = nn.GELU(approximate="tanh")  # the same function in one pass over memory

    def make_embedding(self) -> nn.Module:
        return NormedEmbedding(self.hidden_size, self.config.layer_norm_epsilon)

    def run_block(self, block: nn.Module, hidden: Tensor, step: StepContext) -> Tensor:
        out: Tensor = block(hidden, alibi=None, attention_mask=None, layer_past=step)[0]
        return out


def alibi_slopes(num_heads: int) -> Tensor:
    """Return each head's slope `[num_heads]`: a geometric sequence for the power of two below, then every other term
    of the next one's (https://arxiv.org/abs/2108.12409 and the authors' code)."""
    power = 1 << (num_heads.bit_length() - 1)
    slopes = _geometric(power) + _geometric(2 * power)[::2][: num_heads - power]
    return torch.tensor(slopes, dtype=torch.float32, device="cpu")


def _geometric(num_heads: int) -> list[float]:
    ratio = 2.0 ** -(2.0 ** -(math.log2(num_heads) - 3))
    return [ratio**power for power in range(1, num_heads + 1)]


ARCHITECTURE = Bloom

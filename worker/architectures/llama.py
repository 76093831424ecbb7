"""Llama 1 to 3, SmolLM2, TinyLlama and the many that share their blocks."""

from __future__ import annotations

from typing import Any

from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from worker.architectures.base import Architecture
from worker.rotary_attention import RotaryAttention


class Llama(Architecture):
    """See the module."""

    block_class = LlamaDecoderLayer
    norm_class = LlamaRMSNorm
    rotary_class = LlamaRotaryEmbedding

    def adapt_block(self, block: Any) -> None:
        block.self_attn = RotaryAttention(block.self_attn)


ARCHITECTURE = Llama

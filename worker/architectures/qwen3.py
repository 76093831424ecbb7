"""Qwen3 (dense): norms on queries and keys."""

from __future__ import annotations

from typing import Any

from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm, Qwen3RotaryEmbedding

from worker.architectures.base import Architecture
from worker.rotary_attention import RotaryAttention


class Qwen3(Architecture):
    """See the module."""

    block_class = Qwen3DecoderLayer
    norm_class = Qwen3RMSNorm
    rotary_class = Qwen3RotaryEmbedding

    def adapt_block(self, block: Any) -> None:
        block.self_attn = RotaryAttention(block.self_attn, block.self_attn.sliding_window)


ARCHITECTURE = Qwen3

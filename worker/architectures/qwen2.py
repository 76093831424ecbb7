"""Qwen2 and Qwen2.5: biases on queries, keys and values; a sliding window from block max_window_layers on."""

from __future__ import annotations

from typing import Any

from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm, Qwen2RotaryEmbedding

from worker.architectures.base import Architecture
from worker.rotary_attention import RotaryAttention


class Qwen2(Architecture):
    """See the module."""

    block_class = Qwen2DecoderLayer
    norm_class = Qwen2RMSNorm
    rotary_class = Qwen2RotaryEmbedding

    def adapt_block(self, block: Any) -> None:
        block.self_attn = RotaryAttention(block.self_attn, block.self_attn.sliding_window)


ARCHITECTURE = Qwen2

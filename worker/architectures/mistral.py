"""Mistral: Llama's blocks with a sliding window on every block when the config sets one."""

from __future__ import annotations

from typing import Any

from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralRMSNorm, MistralRotaryEmbedding

from worker.architectures.base import Architecture
from worker.rotary_attention import RotaryAttention


class Mistral(Architecture):
    """See the module."""

    block_class = MistralDecoderLayer
    norm_class = MistralRMSNorm
    rotary_class = MistralRotaryEmbedding

    def adapt_block(self, block: Any) -> None:
        block.self_attn = RotaryAttention(block.self_attn, self.config.sliding_window)


ARCHITECTURE = Mistral

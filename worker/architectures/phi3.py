"""Phi-3 and Phi-4: fused projections, a rotary embedding on part of each head, an optional sliding window."""

from __future__ import annotations

from typing import Any

from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer, Phi3RMSNorm, Phi3RotaryEmbedding

from worker.architectures.base import Architecture
from worker.rotary_attention import JoinedRotaryAttention


class Phi3(Architecture):
    """See the module."""

    activation = "mlp.activation_fn"
    block_class = Phi3DecoderLayer
    norm_class = Phi3RMSNorm
    rotary_class = Phi3RotaryEmbedding
    use_last = ("o_proj",)

    def adapt_block(self, block: Any) -> None:
        block.self_attn = JoinedRotaryAttention(block.self_attn, self.config.sliding_window)


ARCHITECTURE = Phi3

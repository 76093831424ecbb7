"""GPT-NeoX and Pythia: parallel residuals, a rotary embedding on part of each head."""

from __future__ import annotations

from typing import Any

from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer, GPTNeoXRotaryEmbedding

from worker.architectures.base import Architecture
from worker.rotary_attention import InterleavedRotaryAttention


class GPTNeoX(Architecture):
    """See the module."""

    block_class = GPTNeoXLayer
    norm_epsilon = "layer_norm_eps"
    rotary_class = GPTNeoXRotaryEmbedding
    activation = "mlp.act"
    prefix = "gpt_neox."
    embedding_key = "embed_in.weight"
    norm_key = "final_layer_norm."
    head_keys = ("embed_out.weight", "lm_head.weight")

    def adapt_block(self, block: Any) -> None:
        block.attention = InterleavedRotaryAttention(block.attention)


ARCHITECTURE = GPTNeoX

"""Phi-3 and Phi-4: fused projections, a rotary embedding on part of each head, an optional sliding window."""

from __future__ import annotations

from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer, Phi3RMSNorm, Phi3RotaryEmbedding

from worker.architectures.base import Architecture


class Phi3(Architecture):
    """See the module."""

    activation = "mlp.activation_fn"
    block_class = Phi3DecoderLayer
    norm_class = Phi3RMSNorm
    rotary_class = Phi3RotaryEmbedding
    use_last = ("o_proj",)


ARCHITECTURE = Phi3

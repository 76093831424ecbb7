"""Mistral: Llama's blocks with a sliding window on every block when the config sets one."""

from __future__ import annotations

from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralRMSNorm, MistralRotaryEmbedding

from worker.architectures.base import Architecture


class Mistral(Architecture):
    """See the module."""

    block_class = MistralDecoderLayer
    norm_class = MistralRMSNorm
    rotary_class = MistralRotaryEmbedding


ARCHITECTURE = Mistral

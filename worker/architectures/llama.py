"""Llama 1 to 3, SmolLM2, TinyLlama and the many that share their blocks."""

from __future__ import annotations

from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from worker.architectures.base import Architecture


class Llama(Architecture):
    """See the module."""

    block_class = LlamaDecoderLayer
    norm_class = LlamaRMSNorm
    rotary_class = LlamaRotaryEmbedding


ARCHITECTURE = Llama

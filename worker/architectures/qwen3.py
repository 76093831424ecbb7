"""Qwen3 (dense): norms on queries and keys."""

from __future__ import annotations

from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm, Qwen3RotaryEmbedding

from worker.architectures.base import Architecture


class Qwen3(Architecture):
    """See the module."""

    block_class = Qwen3DecoderLayer
    norm_class = Qwen3RMSNorm
    rotary_class = Qwen3RotaryEmbedding


ARCHITECTURE = Qwen3

"""Qwen2 and Qwen2.5: biases on queries, keys and values; a sliding window from block max_window_layers on."""

from __future__ import annotations

from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm, Qwen2RotaryEmbedding

from worker.architectures.base import Architecture


class Qwen2(Architecture):
    """See the module."""

    block_class = Qwen2DecoderLayer
    norm_class = Qwen2RMSNorm
    rotary_class = Qwen2RotaryEmbedding


ARCHITECTURE = Qwen2

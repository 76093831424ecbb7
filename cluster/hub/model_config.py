"""What config.json says, under whichever names an architecture uses, and whether Spanwise can serve it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.errors import ConfigurationError
from cluster.model_spec import SUPPORTED_ARCHITECTURES

NUM_BLOCKS = ("num_hidden_layers", "n_layer")
HIDDEN_SIZE = ("hidden_size", "n_embd", "n_embed")
VOCAB_SIZE = ("vocab_size",)
_MAX_CONTEXT = ("max_position_embeddings", "n_positions", "seq_length")
_BLOOM_CONTEXT = 2048  # ALiBi has no limit; every BLOOM was trained with this one


def check_supported(config: Mapping[str, Any], label: str) -> str:
    """Return the architecture. Raises ConfigurationError for another one, or for quantized weights."""
    architecture = config.get("model_type")
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise ConfigurationError(
            f"{label} has architecture {architecture!r}; Spanwise serves {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise ConfigurationError(
            f"the weights of {label} are quantized ({method}): serve the checkpoint that it was made from"
        )
    return str(architecture)


def positive_integer(config: Mapping[str, Any], names: tuple[str, ...], label: str) -> int:
    """Return the first of `names` that the config has. Raises ConfigurationError when there is none above 0."""
    value = next((config[name] for name in names if config.get(name) is not None), None)
    if type(value) is not int or value < 1:
        raise ConfigurationError(f"config.json of {label} has no usable {names[0]} (found {value!r})")
    return value


def max_context(config: Mapping[str, Any], label: str) -> int:
    """Return the longest context that the config allows, in tokens."""
    if config["model_type"] == "bloom":
        return positive_integer({"seq_length": _BLOOM_CONTEXT, **config}, ("seq_length",), label)
    return positive_integer(config, _MAX_CONTEXT, label)


def eos_token_ids(config: Mapping[str, Any], generation_config: Mapping[str, Any]) -> frozenset[int]:
    """Return the token ids that end a text: generation_config.json's, else config.json's, else none."""
    declared = generation_config.get("eos_token_id", config.get("eos_token_id"))
    ids = declared if isinstance(declared, list) else [declared]
    return frozenset(token_id for token_id in ids if type(token_id) is int and token_id >= 0)

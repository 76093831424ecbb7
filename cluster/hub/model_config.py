"""What config.json says, under whichever names an architecture uses, and whether Spanwise can serve it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.errors import ConfigurationError
from cluster.model_spec import SUPPORTED_ARCHITECTURES, Precision

NUM_BLOCKS = ("num_hidden_layers", "n_layer")
HIDDEN_SIZE = ("hidden_size", "n_embd", "n_embed")
VOCAB_SIZE = ("vocab_size",)
_MAX_CONTEXT = ("max_position_embeddings", "n_positions", "seq_length")
_BLOOM_CONTEXT = 2048  # ALiBi has no limit; every BLOOM was trained with this one


def check_supported(config: Mapping[str, Any], label: str) -> str:
    """Return the architecture. Raises ConfigurationError for another one, or for weights in a scheme not served."""
    architecture = config.get("model_type")
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise ConfigurationError(
            f"{label} has architecture {architecture!r}; Spanwise serves {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    quantized_precision(config, label)
    return str(architecture)


def quantized_precision(config: Mapping[str, Any], label: str) -> Precision | None:
    """Return what a checkpoint that comes quantized by bitsandbytes is stored in; None for one that is not quantized.

    Raises ConfigurationError for other schemes, naming the scheme and the way out.
    """
    scheme = config.get("quantization_config") or config.get("compression_config")
    if not scheme:
        return None
    fields = scheme if isinstance(scheme, Mapping) else {"quant_method": scheme}
    is_8bit, is_4bit = fields.get("load_in_8bit") is True, fields.get("load_in_4bit") is True
    method = str(fields.get("quant_method") or ("bitsandbytes" if is_8bit or is_4bit else "in an unknown way"))
    if method == "bitsandbytes" and is_8bit:
        return Precision.INT8
    if method == "bitsandbytes" and is_4bit:
        four_bit = fields.get("bnb_4bit_quant_type", "fp4")  # bitsandbytes' own default
        if four_bit == "nf4":
            return Precision.NF4
        method = f"bitsandbytes {four_bit}"
    raise ConfigurationError(
        f"the weights of {label} are quantized ({method}), of which Spanwise reads bitsandbytes' nf4 and 8-bit only: "
        f"serve {_original(config, label)} with --precision int8 or nf4"
    )


def _original(config: Mapping[str, Any], label: str) -> str:
    named = config.get("_name_or_path")
    is_other = isinstance(named, str) and bool(named) and named not in label
    return f"the checkpoint that it was made from, {named}," if is_other else "the original 16-bit checkpoint"


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

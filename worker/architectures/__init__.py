"""One adapter per supported model family, in the module named as config.json's `model_type`.

An allowlist: a family is admitted by a parity test and refused by name otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING

from cluster.errors import ConfigurationError
from cluster.model_spec import SUPPORTED_ARCHITECTURES
from worker.architectures.base import Architecture
from worker.blocks import ATTENTION_NAME, register_attention

__all__ = ["Architecture", "open_architecture"]


def open_architecture(config: Mapping[str, Any]) -> Architecture:
    """Return the adapter for a config.json. Raises ConfigurationError for what cannot be served, by name.

    Never runs code from the checkpoint: `auto_map` entries are ignored.
    """
    model_type = config.get("model_type", "")
    if model_type not in SUPPORTED_ARCHITECTURES:
        raise ConfigurationError(
            f"models of type {model_type or '(none: config.json has no model_type)'} are not supported; "
            f"these are: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    _refuse_quantized(config)
    register_attention()
    adapter: type[Architecture] = import_module(f"{__name__}.{model_type}").ARCHITECTURE
    parsed = _parse(model_type, config)
    return adapter(parsed)


def _refuse_quantized(config: Mapping[str, Any]) -> None:
    quantization = config.get("quantization_config")
    if quantization:
        method = str(quantization.get("quant_method") or "an unnamed method").upper()
        raise ConfigurationError(
            f"the checkpoint is already quantized ({method}), which Spanwise does not read: "
            "serve the original 16-bit or 32-bit checkpoint of the same model"
        )


def _parse(model_type: str, config: Mapping[str, Any]) -> Any:
    try:
        parsed = CONFIG_MAPPING[model_type].from_dict(dict(config))
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigurationError(f"config.json is not a valid {model_type} config: {error}") from error
    parsed._attn_implementation = ATTENTION_NAME
    return parsed

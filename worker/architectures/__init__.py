"""One adapter per supported model family, in the module named as config.json's `model_type`.

An allowlist: a family is admitted by a parity test and refused by name otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from importlib import import_module
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING

from cluster.errors import ConfigurationError
from cluster.hub.model_config import check_supported
from worker.architectures.base import Architecture
from worker.blocks import ATTENTION_NAME, register_attention

__all__ = ["Architecture", "open_architecture"]


def open_architecture(config: Mapping[str, Any]) -> Architecture:
    """Return the adapter for a config.json. Raises ConfigurationError for what cannot be served, by name.

    Never runs code from the checkpoint: `auto_map` entries are ignored.
    """
    model_type = check_supported(config, "the checkpoint")
    adapter: type[Architecture] = import_module(f"{__name__}.{model_type}").ARCHITECTURE
    register_attention()
    try:
        parsed = CONFIG_MAPPING[model_type].from_dict(deepcopy(dict(config)))
        parsed._attn_implementation = ATTENTION_NAME
        architecture = adapter(parsed)
        architecture.build_block(0)
    except (StrictDataclassError, LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise ConfigurationError(f"config.json is not a valid {model_type} config: {error}") from error
    return architecture

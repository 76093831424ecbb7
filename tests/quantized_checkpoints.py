"""Checkpoints as transformers saves them with a BitsAndBytesConfig, made without its dependencies."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from bitsandbytes import functional as bitsandbytes
from safetensors.torch import load_file
from torch import Tensor

from tests.checkpoints import make_checkpoint, write_weights
from tests.small_checkpoints import change_config

Scheme = Literal["nf4", "nf4 quantized once", "int8"]
SCHEMES: tuple[Scheme, ...] = ("nf4", "nf4 quantized once", "int8")
SIZES = {"hidden_size": 64, "intermediate_size": 128}


def make_quantized(folder: Path, scheme: Scheme, skipped: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Write a tiny Llama whose linear layers are quantized, but for the head or `skipped`, and return the tensors of
    the unquantized checkpoint that has the same values."""
    make_checkpoint(folder, "llama", SIZES, dtype=torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    stored, values = {}, {}
    for name, tensor in tensors.items():
        is_linear = tensor.dim() == 2 and "embed" not in name
        is_skipped = any(name.removesuffix(".weight").endswith(skip) for skip in skipped or ["lm_head"])
        stored[name], values[name] = tensor, tensor.float()
        if is_linear and not is_skipped:
            quantized, values[name] = _quantize(name, tensor, scheme)
            stored.update(quantized)
    write_weights(folder, stored)
    change_config(folder, quantization_config=describe(scheme, skipped))
    assert config["model_type"] == "llama"
    return values


def describe(scheme: Scheme, skipped: Sequence[str] | None = None) -> dict[str, Any]:
    """Return config.json's quantization_config."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": scheme == "int8",
        "load_in_4bit": scheme != "int8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": scheme == "nf4",
        "llm_int8_skip_modules": list(skipped) if skipped is not None else None,
    }


def _quantize(name: str, weight: Tensor, scheme: Scheme) -> tuple[Mapping[str, Tensor], Tensor]:
    """Return what takes the weight's place, by name, and what it means."""
    if scheme == "int8":
        codes, scb, _ = bitsandbytes.int8_vectorwise_quant(weight.half())
        layer = name.removesuffix("weight")
        tensors = {name: codes, layer + "SCB": scb, layer + "weight_format": torch.tensor(0, dtype=torch.uint8)}
        return tensors, codes.float() * (scb / 127)[:, None]
    packed, state = bitsandbytes.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=scheme == "nf4"
    )
    parts = {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}
    state.dtype = torch.float32
    return {name: packed, **parts}, bitsandbytes.dequantize_4bit(packed, state)

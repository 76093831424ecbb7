"""Weights of checkpoints that come quantized by bitsandbytes, as they are: 4-bit NF4 and 8-bit with a scale per row.

Tensors of a layer X, as transformers saves them. 4 bits: X.weight (two codes a byte), X.weight.absmax, .quant_map,
.quant_state.bitsandbytes__nf4 (JSON), and with double quantization .nested_absmax and .nested_quant_map. 8 bits:
X.weight (int8) and X.SCB (largest magnitude per row), X.weight_format. Layers without those were left in 16 bits.

Covers reading; `cluster.hub.model_config` refuses other schemes before anything is downloaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from cluster.errors import ConfigurationError
from cluster.model_spec import Precision
from worker.quantization import nf4
from worker.stored_weight import MemoryWeight, Piece

_STATE = ".quant_state.bitsandbytes__nf4"
_NF4_SUFFIXES = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", _STATE)
_ROW_FORMAT = 0  # of X.weight_format
_MAP_TOLERANCE = 1e-6  # bitsandbytes' own, for maps computed by other versions


class Tensors(Protocol):
    """An open checkpoint, see worker.weights.Checkpoint."""

    def names(self) -> Collection[str]: ...

    def tensor(self, name: str) -> Tensor: ...


def companion_names(name: str) -> tuple[str, ...]:
    """Return the names that may hold what belongs to weight `name` if it is quantized."""
    layer = name.removesuffix("weight")
    return (*(name + suffix for suffix in _NF4_SUFFIXES), layer + "SCB", layer + "weight_format")


def quantized_kind(names: Collection[str], name: str) -> Precision | None:
    """Return how weight `name` of a checkpoint that has `names` is quantized; None if it is not."""
    if name + _STATE in names:
        return Precision.NF4
    return Precision.INT8 if name.removesuffix("weight") + "SCB" in names else None


def is_quantized_twice(names: Collection[str], name: str) -> bool:
    """Tell whether an NF4 weight's absmaxes are quantized themselves."""
    return name + ".nested_absmax" in names


def is_kept(config: Mapping[str, Any], module: str) -> bool:
    """Tell whether config.json says that a linear layer, by its full name, was left in 16 bits: by default the head.

    For estimates: reading goes by what the checkpoint holds. The rules of names are transformers' own.
    """
    scheme = config.get("quantization_config")
    if not scheme:
        return False
    patterns = scheme.get("llm_int8_skip_modules") or ["lm_head"]
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return any(re.match(f"(?:{pattern}){boundary}", module) or module.endswith(pattern) for pattern in patterns)


def has_plain_absmaxes(config: Mapping[str, Any]) -> bool:
    """Tell whether config.json says that 4-bit weights have fp32 absmaxes, four times as large as those of 8 bits."""
    scheme = config.get("quantization_config") or {}
    return scheme.get("load_in_4bit") is True and not scheme.get("bnb_4bit_use_double_quant")


def read_quantized(checkpoint: Tensors, name: str, layer: str, shape: tuple[int, int]) -> MemoryWeight:
    """Return weight `name`, `shape` [out, in], as the checkpoint holds it: one piece, which may view its files.

    `layer` is what the result is called. Raises ConfigurationError naming the tensor that is not as it must be.
    """
    reader = _Reader(checkpoint, name)
    if quantized_kind(checkpoint.names(), name) is Precision.INT8:
        return _read_int8(reader, layer, shape)
    return _read_nf4(reader, layer, shape)


@dataclass(frozen=True, slots=True)
class _Reader:
    """The tensors of one weight."""

    checkpoint: Tensors
    name: str

    def get(self, suffix: str, dtype: torch.dtype, num_elements: int) -> Tensor:
        """Return a tensor of this weight, flat."""
        return self.read(self.name + suffix, dtype, num_elements)

    def read(self, name: str, dtype: torch.dtype, num_elements: int) -> Tensor:
        """Return a tensor, flat."""
        found = self.find(name)
        if found.dtype != dtype or found.numel() != num_elements:
            raise ConfigurationError(
                f"tensor {name} holds {found.numel()} numbers of {str(found.dtype).removeprefix('torch.')}, but the "
                f"shape that config.json implies needs {num_elements} of {str(dtype).removeprefix('torch.')}: they "
                "belong to different models, or another scheme quantized it"
            )
        return found.reshape(-1)

    def find(self, name: str) -> Tensor:
        """Return a tensor as it lies there."""
        if name not in self.checkpoint.names():
            raise ConfigurationError(
                f"the checkpoint lacks tensor {name}, without which the quantized weight {self.name} cannot be read: "
                "fetch it again"
            )
        return self.checkpoint.tensor(name)

    def refuse(self, what: str) -> ConfigurationError:
        return ConfigurationError(
            f"weight {self.name} {what}: serve the original 16-bit checkpoint with --precision nf4 or int8"
        )


def _read_nf4(reader: _Reader, layer: str, shape: tuple[int, int]) -> MemoryWeight:
    num_parameters = shape[0] * shape[1]
    num_blocks = -(-num_parameters // nf4.BLOCK)
    nested_offset = _read_state(reader, shape)
    _check_map(reader, ".quant_map", torch.tensor(nf4.VALUES))
    stored = reader.find(reader.name)
    codes = stored.reshape(-1).view(torch.uint8)  # other quant_storage dtypes are views of these bytes
    if codes.numel() != (num_parameters + 1) // 2:
        raise reader.refuse(f"has {codes.numel()} bytes of codes, but {num_parameters} parameters of 4 bits")
    if not is_quantized_twice(reader.checkpoint.names(), reader.name):
        tensors = {"weight": codes, "absmax": reader.get(".absmax", torch.float32, num_blocks)}
        return MemoryWeight(layer, Precision.NF4, shape, {}, (Piece(0, shape[0], tensors),))
    _check_map(reader, ".nested_quant_map", nf4.dynamic_map())
    num_nested = -(-num_blocks // nf4.NESTED_BLOCK)
    small = {
        "nested_absmax": reader.get(".nested_absmax", torch.float32, num_nested),
        "nested_offset": torch.tensor(nested_offset),
    }
    tensors = {"weight": codes, "absmax": reader.get(".absmax", torch.uint8, num_blocks)}
    return MemoryWeight(layer, Precision.NF4, shape, small, (Piece(0, shape[0], tensors),))


def _read_state(reader: _Reader, shape: tuple[int, int]) -> float:
    """Check the state; return what was taken off absmaxes before they were quantized."""
    packed = reader.find(reader.name + _STATE)
    try:
        state = json.loads(bytes(packed.tolist()))
        described = (state["quant_type"], state["blocksize"], state.get("nested_blocksize", nf4.NESTED_BLOCK))
        stored_shape = tuple(state["shape"])
        is_twice = is_quantized_twice(reader.checkpoint.names(), reader.name)
        nested_offset = float(state["nested_offset"]) if is_twice else 0.0
    except (ValueError, TypeError, KeyError) as error:
        raise reader.refuse(f"has a quant_state that cannot be read ({error!r})") from error
    if described != ("nf4", nf4.BLOCK, nf4.NESTED_BLOCK):
        kind, block, nested = described
        raise reader.refuse(f"is quantized as {kind} in blocks of {block} and {nested}, not nf4 in 64 and 256")
    if stored_shape != shape:
        raise reader.refuse(f"was quantized with shape {list(stored_shape)}, but config.json implies {list(shape)}")
    return nested_offset


def _check_map(reader: _Reader, suffix: str, expected: Tensor) -> None:
    found = reader.get(suffix, torch.float32, expected.numel())
    if not torch.allclose(found, expected, rtol=0, atol=_MAP_TOLERANCE):
        raise reader.refuse(f"has codes of its own ({reader.name}{suffix})")


def _read_int8(reader: _Reader, layer: str, shape: tuple[int, int]) -> MemoryWeight:
    prefix = reader.name.removesuffix("weight")
    stored = reader.find(reader.name)
    if stored.dtype is not torch.int8 or tuple(stored.shape) != shape:
        raise reader.refuse(
            f"is {str(stored.dtype).removeprefix('torch.')} {list(stored.shape)}, where int8 {list(shape)} belongs"
        )
    layout = prefix + "weight_format"
    if layout in reader.checkpoint.names() and int(reader.find(layout)) != _ROW_FORMAT:
        raise reader.refuse("is laid out for one kind of GPU (weight_format is not row)")
    scale = reader.read(prefix + "SCB", torch.float32, shape[0]) / 127
    return MemoryWeight(layer, Precision.INT8, shape, {"scale": scale}, (Piece(0, shape[0], {"weight": stored}),))

"""The tensors of a checkpoint by the parts that need them: found, checked, encoded.

Covers names, shapes and dtypes; fetching and opening files is `worker.weights`' business, names of keys are
`worker.architectures`'.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from cluster.errors import ConfigurationError, StorageError
from cluster.load_order import LoadOrder
from cluster.model_spec import Precision
from worker.architectures import Architecture
from worker.architectures.base import Part
from worker.blocks import LinearLayer
from worker.numerics import DTYPES, name_of
from worker.quantization.bitsandbytes import companion_names, is_quantized_twice, quantized_kind, read_quantized
from worker.quantization.encode import encode
from worker.store.key import EMBEDDING, HEAD
from worker.store.layout import WeightSpec
from worker.stored_weight import MemoryWeight, whole_weight
from worker.weights import Checkpoint

TILE_ELEMENTS = 1 << 21  # looked at at a time
READABLE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class CheckpointWeights:
    """An open checkpoint of one model."""

    def __init__(self, order: LoadOrder, architecture: Architecture, checkpoint: Checkpoint) -> None:
        self._order, self._architecture, self._checkpoint = order, architecture, checkpoint
        self._names = checkpoint.names()
        self.is_quantized = bool(order.config.get("quantization_config"))

    def tensor(self, key: str, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor as it lies in the checkpoint, fp64 as fp32. Raises ConfigurationError naming it."""
        name = self._find(key)
        found = self._checkpoint.tensor(name)
        file = self._order.weight_map.get(name) or self._files_text()
        if tuple(found.shape) != shape:
            raise ConfigurationError(
                f"tensor {name} in {file} has shape {list(found.shape)}, but config.json implies {list(shape)}: "
                "they belong to different models"
            )
        if found.dtype not in READABLE_DTYPES:
            raise ConfigurationError(
                f"tensor {name} in {file} holds {str(found.dtype).removeprefix('torch.')} numbers, which only mean "
                "something together with a quantization scheme: serve the original 16-bit or 32-bit checkpoint"
            )
        return found.float() if found.dtype is torch.float64 else found

    def table(self) -> Tensor:
        """Return the embedding `[vocab_size, hidden_size]` as it lies in the checkpoint."""
        return self.tensor(
            self._architecture.embedding_key, (self._architecture.vocab_size, self._architecture.hidden_size)
        )

    def quantized_spec(self, key: str, layer: LinearLayer) -> WeightSpec:
        """Return how a checkpoint that comes quantized holds a linear layer's weight."""
        name = self._find(key)
        kind = quantized_kind(self._names, name)
        if kind is None:
            return WeightSpec(layer.name, Precision(name_of(self._kept(key, layer).dtype)), layer.shape)
        absmax_dtype = "U8" if is_quantized_twice(self._names, name) else "F32"
        return WeightSpec(layer.name, kind, layer.shape, absmax_dtype=absmax_dtype)

    def quantized(self, key: str, layer: LinearLayer) -> MemoryWeight:
        """Return a linear layer's weight as a checkpoint that comes quantized holds it, be it quantized or not."""
        name = self._find(key)
        if quantized_kind(self._names, name) is not None:
            return read_quantized(self._checkpoint, name, layer.name, layer.shape)
        kept = self._kept(key, layer).contiguous()
        return whole_weight(layer.name, Precision(name_of(kept.dtype)), kept)

    def _kept(self, key: str, layer: LinearLayer) -> Tensor:
        found = self.tensor(key, layer.shape[::-1] if layer.is_transposed else layer.shape)
        return found.t() if layer.is_transposed else found

    def part(self, part: Part, precision: Precision, *, is_copied: bool) -> PartOfCheckpoint:
        """Return a part's tensors as they are stored in `precision`. What the part before took is let go."""
        self._checkpoint.forget_pages()
        return PartOfCheckpoint(self, part, precision.of_head if part.name == HEAD else precision, is_copied)

    def close(self) -> None:
        """Close the checkpoint; tensors stay valid."""
        self._checkpoint.close()

    def _find(self, key: str) -> str:
        names = self._architecture.checkpoint_keys(key)
        name = next((name for name in names if name in self._names), None)
        if name is None:
            raise ConfigurationError(f"the checkpoint lacks tensor {' or '.join(names)}: not in {self._files_text()}")
        return name

    def _files_text(self) -> str:
        files = [file.name for file in self._order.weight_files]
        return files[0] if len(files) == 1 else f"any of its {len(files)} weight files"


@dataclass(frozen=True, slots=True)
class PartOfCheckpoint:
    """One part. With `is_copied` weights are no views of the checkpoint's files, since resident ones must not depend on
    the page cache."""

    source: CheckpointWeights
    of: Part
    precision: Precision
    is_copied: bool

    def weight(self, layer: LinearLayer) -> MemoryWeight:
        """Return a linear layer's weight in the part's precision."""
        key = f"{self.of.key}{layer.name}.weight"
        if self.source.is_quantized:
            return self.source.quantized(key, layer)
        found = self.source.tensor(key, layer.shape[::-1] if layer.is_transposed else layer.shape)
        encoded = self._encode(layer.name, found.t() if layer.is_transposed else found)
        if self.precision.is_quantized:
            _check_finite(key, found, self.precision)
        elif DTYPES[self.precision.value] != found.dtype:
            _check_finite(key, encoded.held[0].tensors["weight"], self.precision)
        return encoded

    def spec(self, layer: LinearLayer) -> WeightSpec:
        """Return what a linear layer's weight will be stored as."""
        spec = WeightSpec(layer.name, self.precision, layer.shape)
        if self.source.is_quantized:
            spec = self.source.quantized_spec(f"{self.of.key}{layer.name}.weight", layer)
        return replace(spec, expert=self.of.use.expert(layer.name))

    def tensor(self, name: str, shape: torch.Size) -> Tensor:
        """Return a small tensor: beside quantized weights as in the checkpoint, else rounded as weights are."""
        key = self.of.key + name
        found = self.source.tensor(key, tuple(shape))
        if self.precision.is_quantized or found.dtype == DTYPES[self.precision.value]:
            return found
        rounded = found.to(DTYPES[self.precision.value])
        _check_finite(key, rounded, self.precision)
        return rounded

    def _encode(self, name: str, weight: Tensor) -> MemoryWeight:
        if self.precision.is_quantized or not self.is_copied:
            return encode(name, weight, self.precision)
        copied = torch.empty(weight.shape, dtype=DTYPES[self.precision.value]).copy_(weight)
        return whole_weight(name, self.precision, copied)


class DirectWeights:
    """The parts of a span straight from the checkpoint, without a copy on disk."""

    def __init__(self, weights: CheckpointWeights, precision: Precision) -> None:
        self._weights, self._precision = weights, precision
        self.streams = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._weights.close()

    def part(self, part: Part) -> PartOfCheckpoint:
        """Return a part's tensors."""
        return self._weights.part(part, self._precision, is_copied=True)

    def table(self) -> Tensor:
        """Return the embedding as it lies in the checkpoint: memory-mapped where its format allows."""
        return self._weights.table()

    def rebuild(self, part: Part, error: StorageError) -> None:  # noqa: ARG002 - see SpanWeights
        """Raise: a checkpoint is not made here."""
        raise error


def needed_names(architecture: Architecture, parts: Iterable[Part]) -> frozenset[str]:
    """Return the names that a checkpoint may use for the tensors of some parts."""
    keys = [part.key + name for part in parts for name, _ in part.module.named_parameters()]
    if any(part.name == EMBEDDING for part in parts):
        keys.append(architecture.embedding_key)
    names = {name for key in keys for name in architecture.checkpoint_keys(key)}
    return frozenset(names.union(*(companion_names(name) for name in names if name.endswith("weight"))))


def _check_finite(key: str, values: Tensor, precision: Precision) -> None:
    tiles = torch.split(values, max(1, TILE_ELEMENTS // max(1, values[0].numel())))  # a sum of 16 bits copies them
    if all(bool(tile.sum(dtype=torch.float32).isfinite()) for tile in tiles):
        return
    if precision is Precision.FP16:
        raise ConfigurationError(f"tensor {key} has values that do not fit fp16: use --precision bf16")
    raise ConfigurationError(f"tensor {key} has values that are not numbers: the checkpoint is damaged, fetch it again")

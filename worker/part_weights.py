"""From a part's tensors, wherever they are, to its modules on the device.

Covers dtypes, devices, grouping and the account of memory; `worker.checkpoint_weights` and `worker.store_weights`
bring the tensors, `worker.linear` builds the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from cluster.model_spec import Precision
from worker.architectures.base import Part
from worker.blocks import LinearLayer, materialize
from worker.linear import LinearNumerics, Scratch, build_linears
from worker.numerics import name_of
from worker.stored_weight import StoredWeight, whole_weight


class PartTensors(Protocol):
    """One part's tensors, on the CPU."""

    def weight(self, layer: LinearLayer) -> StoredWeight:
        """Return a linear layer's weight as it is stored."""
        ...

    def tensor(self, name: str, shape: torch.Size) -> Tensor:
        """Return a small tensor, or the weight of a layer that is not quantized, in whichever dtype."""
        ...


class RowTable(Protocol):
    """An embedding: a tensor, or rows on the disk."""

    def __getitem__(self, rows: Tensor, /) -> Tensor:
        """Return the rows of token ids `[num_tokens]`: `[num_tokens, hidden_size]` on the CPU."""
        ...


class PartBuilder:
    """Builds the parts of one span."""

    def __init__(self, numerics: LinearNumerics, on_parameters: Callable[[int], None]) -> None:
        """`on_parameters` is told how many numbers were loaded."""
        self.numerics, self.on_parameters = numerics, on_parameters
        self.scratch = Scratch()
        self.weight_bytes = 0  # held in memory so far

    def again(self) -> PartBuilder:
        """Return a builder for parts that are built again later: nobody waits for its progress."""
        builder = PartBuilder(self.numerics, lambda _: None)
        builder.scratch = self.scratch
        return builder

    def build(self, part: Part, tensors: PartTensors) -> nn.Module:
        """Return the part's module, loaded. Its meta module is used up, even when this raises."""
        source = _PartWeights(self, part, tensors)
        built = materialize(part.module, part.use, source)
        self.weight_bytes += source.weight_bytes
        return built


class _PartWeights:
    """The WeightSource of one part."""

    def __init__(self, builder: PartBuilder, part: Part, tensors: PartTensors) -> None:
        self._builder, self._part, self._tensors = builder, part, tensors
        self._numerics = builder.numerics
        self.weight_bytes = 0

    def linears(self, layers: Sequence[LinearLayer]) -> list[nn.Module]:
        """See WeightSource."""
        weights = [self._weight(layer) for layer in layers]
        biases = [
            self.tensor(f"{layer.name}.bias", torch.Size(layer.shape[:1])) if layer.has_bias else None
            for layer in layers
        ]
        built = build_linears(weights, biases, self._numerics, self._builder.scratch)
        self._builder.on_parameters(sum(rows * columns for rows, columns in (layer.shape for layer in layers)))
        return built

    def tensor(self, name: str, shape: torch.Size) -> Tensor:
        """See WeightSource."""
        found = self._tensors.tensor(name, shape)
        loaded = torch.empty(shape, dtype=self._numerics.compute, device=self._numerics.device).copy_(found)
        self.weight_bytes += loaded.nbytes
        self._builder.on_parameters(found.numel())
        return loaded

    def buffer(self, value: Tensor) -> Tensor:
        """See WeightSource."""
        return value.to(self._numerics.device)

    def _weight(self, layer: LinearLayer) -> StoredWeight:
        if layer.name in self._part.use.unquantized:
            found = self._tensors.tensor(f"{layer.name}.weight", torch.Size(layer.shape))
            copied = torch.empty(layer.shape, dtype=self._numerics.compute).copy_(found)
            weight: StoredWeight = whole_weight(layer.name, Precision(name_of(copied.dtype)), copied)
        else:
            weight = self._tensors.weight(layer)
        self.weight_bytes += _held_bytes(weight)
        return weight


def _held_bytes(weight: StoredWeight) -> int:
    small = sum(tensor.nbytes for tensor in weight.small.values())
    if weight.is_streamed:
        return small
    num_rows, num_columns = weight.shape
    return small + int(num_rows * num_columns * weight.kind.bits_per_parameter / 8)

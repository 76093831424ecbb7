"""Converts one part of a checkpoint: encodes its weights in order of use and writes them to the block store.

Peak memory is about one weight as stored: sources are memory-mapped, and encoded a tile of rows at a time. Bytes depend
on the checkpoint, the precision and the format's version only. Covers a part whose lock the caller holds;
`worker.store.fill` decides which, and brings the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from cluster.model_spec import Precision
from worker.architectures.base import Part
from worker.blocks import LinearLayer, linear_groups, small_shapes
from worker.checkpoint_weights import CheckpointWeights, PartOfCheckpoint
from worker.numerics import name_of
from worker.store.folder import BlockStore
from worker.store.key import EMBEDDING
from worker.store.layout import WeightSpec, plan_part
from worker.store.manifest import PartManifest
from worker.store.tensors import spec_of
from worker.store.writer import write_part
from worker.stored_weight import MemoryWeight, whole_weight

TABLE = "embed_tokens"
"""The embedding's name in its part, whatever the family calls it."""


def convert_part(
    part: Part,
    checkpoint: CheckpointWeights,
    store: BlockStore,
    precision: Precision,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> PartManifest:
    """Write a part. `on_bytes` is told how many bytes each write added. Raises ConfigurationError naming the tensor
    and what to do; the part is then not there.

    The embedding's table keeps the checkpoint's dtype: only the rows of tokens are ever read.
    """
    tensors = checkpoint.part(part, precision, is_copied=False)
    small = _small_tensors(part, tensors)
    table = [whole_table(checkpoint.table())] if part.name == EMBEDDING else []
    layers = stored_layers(part)
    specs = [WeightSpec(weight.name, weight.kind, weight.shape) for weight in table]
    specs += [tensors.spec(layer) for layer in layers]
    plan = plan_part(part.name, precision, {name: spec_of(tensor) for name, tensor in small.items()}, specs)
    return write_part(store, plan, small, _weights(table, layers, tensors), on_bytes)


def stored_layers(part: Part) -> list[LinearLayer]:
    """Return the linear layers whose weights are stored in the part's precision, in order of use."""
    return [layer for layer in _layers(part) if not is_plain(part, layer)]


def is_plain(part: Part, layer: LinearLayer) -> bool:
    """Tell whether a layer's weight is a small tensor like a norm's."""
    return layer.name in part.use.unquantized


def _layers(part: Part) -> Iterator[LinearLayer]:
    return (layer for group in linear_groups(part.module, part.use) for layer in group)


def whole_table(table: Tensor) -> MemoryWeight:
    """Return the embedding `[vocab_size, hidden_size]` as a weight in its own dtype."""
    return whole_weight(TABLE, Precision(name_of(table.dtype)), table.contiguous())


def _small_tensors(part: Part, tensors: PartOfCheckpoint) -> dict[str, Tensor]:
    shapes = small_shapes(part.module)
    shapes |= {f"{layer.name}.weight": torch.Size(layer.shape) for layer in _layers(part) if is_plain(part, layer)}
    return {name: tensors.tensor(name, shape).contiguous() for name, shape in shapes.items()}


def _weights(
    table: Sequence[MemoryWeight], layers: Sequence[LinearLayer], tensors: PartOfCheckpoint
) -> Iterator[MemoryWeight]:
    yield from table
    for layer in layers:
        yield tensors.weight(layer)

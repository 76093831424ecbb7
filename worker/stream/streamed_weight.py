"""StoredWeights whose bytes pass through the ring or the experts' cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from cluster.model_spec import Precision
from worker.store.manifest import TensorPlace, WeightPlace
from worker.stored_weight import Piece
from worker.stream.streamed_file import Extent

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8, "U8": torch.uint8}


class ExtentSource(Protocol):
    """Where the bytes of extents come from."""

    def take(self, extent: Extent) -> Tensor:
        """Return at least the bytes of `extent`, uint8, valid until the next call."""
        ...


class StreamedWeight:
    """See StoredWeight. Its pieces are views of what `source` hands out."""

    def __init__(
        self, place: WeightPlace, small: Mapping[str, Tensor], extents: Sequence[Extent], source: ExtentSource
    ) -> None:
        """`extents[i]` holds the part's slice i: `slice_extents(…)`, or an expert's extent for each of its slices."""
        self.name, self.kind, self.shape, self.small = place.name, Precision(place.kind), place.shape, small
        self._source = source
        self._pieces = tuple((piece, extents[piece.slice_index]) for piece in place.pieces)

    @property
    def is_streamed(self) -> bool:
        return True

    def pieces(self) -> Iterator[Piece]:
        """See StoredWeight."""
        for place, extent in self._pieces:
            memory = self._source.take(extent)
            tensors = {role: _view(memory, tensor, extent.offset) for role, tensor in place.tensors.items()}
            yield Piece(place.first_row, place.num_rows, tensors)


def _view(memory: Tensor, place: TensorPlace, offset: int) -> Tensor:
    """Return a tensor of a file as a view of `memory`, which holds the file from `offset` on."""
    dtype = _DTYPES[place.dtype]
    start = place.offset - offset
    assert math.prod(place.shape) * dtype.itemsize == place.num_bytes
    return memory[start : start + place.num_bytes].view(dtype).view(place.shape)

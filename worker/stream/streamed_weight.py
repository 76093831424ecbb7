"""StoredWeights whose bytes pass through the ring or the experts' cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from cluster.model_spec import Precision
from worker.store.manifest import WeightPlace
from worker.store.tensors import view_bytes
from worker.stored_weight import Piece
from worker.stream.streamed_file import Extent


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
            tensors = {
                role: view_bytes(memory, tensor.offset - extent.offset, tensor)
                for role, tensor in place.tensors.items()
            }
            yield Piece(place.first_row, place.num_rows, tensors)

"""Reads the tensors of a part: each that is returned was compared with its checksum.

Pages of the file are dropped from the page cache once copied, since resident weights are held once. Two kinds of reads
are not compared: the ring of `worker.stream`, which reads slices by `fileno` and the manifest's places and says itself
what it checks, and `read_rows`, whose rows are smaller than anything that has a checksum. `worker.store.verify` checks
a whole part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.model_spec import Precision
from worker.store.manifest import PiecePlace, TensorPlace, WeightPlace
from worker.store.part_bytes import PartBytes, label
from worker.store.tensors import DTYPES, bytes_of, empty
from worker.stored_weight import Piece


class PartFile(PartBytes):
    """An open part whose tensors can be read. Every method raises StorageError for what cannot be read or differs."""

    def __enter__(self) -> PartFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read_weight_small(self, place: WeightPlace) -> dict[str, Tensor]:
        """Return a weight's small tensors by role."""
        return {role: self.read_tensor(label(place.name, role), found) for role, found in place.small.items()}

    def open_weight(self, place: WeightPlace) -> FileWeight:
        """Return a weight whose pieces are read when they are asked for, so that packing holds one at a time."""
        return FileWeight(self, place, self.read_weight_small(place))

    def read_piece(self, place: WeightPlace, piece: PiecePlace) -> Piece:
        """Return one piece, in memory of its own."""
        tensors = {role: self.read_tensor(label(place.name, role), found) for role, found in piece.tensors.items()}
        return Piece(piece.first_row, piece.num_rows, tensors)

    def read_tensor(self, name: str, place: TensorPlace) -> Tensor:
        """Return a tensor, called `name` in messages."""
        tensor = empty(place)
        self.read_checked(bytes_of(tensor), name, place)
        return tensor

    def read_rows(self, place: WeightPlace, rows: Sequence[int]) -> Tensor:
        """Return `[len(rows), in]` of a weight that is not quantized, not compared with a checksum."""
        out = torch.empty(len(rows), place.shape[1], dtype=DTYPES[place.pieces[0].tensors["weight"].dtype])
        view, row_bytes = bytes_of(out), place.shape[1] * out.itemsize
        for index, row in enumerate(rows):
            piece = next(piece for piece in place.pieces if row < piece.first_row + piece.num_rows)
            offset = piece.tensors["weight"].offset + (row - piece.first_row) * row_bytes
            self._fill(view[index * row_bytes : (index + 1) * row_bytes], offset, place.name)
        return out


@dataclass(frozen=True, slots=True)
class FileWeight:
    """A StoredWeight that will be held in memory. Each call of `pieces` reads the file, which must be open."""

    file: PartFile
    place: WeightPlace
    small: Mapping[str, Tensor]
    is_streamed: bool = False

    @property
    def name(self) -> str:
        return self.place.name

    @property
    def kind(self) -> Precision:
        return Precision(self.place.kind)

    @property
    def shape(self) -> tuple[int, int]:
        return self.place.shape

    def pieces(self) -> Iterator[Piece]:
        """See StoredWeight."""
        return (self.file.read_piece(self.place, piece) for piece in self.place.pieces)

"""Reads the tensors of a part: each that is returned was compared with its checksum.

Pages of the file are dropped from the page cache once copied, since resident weights are held once. Two kinds of reads
are not compared: the ring of `worker.stream`, which reads slices by `fileno` and the manifest's places and says itself
what it checks, and `read_rows`, whose rows are smaller than anything that has a checksum. `worker.store.verify` checks
a whole part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cluster.model_spec import Precision
from worker.store.manifest import PiecePlace, TensorPlace, WeightPlace
from worker.store.part_bytes import PartBytes, label
from worker.store.tensors import DTYPES, bytes_of, empty, view_bytes
from worker.stored_weight import MemoryWeight, Piece


class PartFile(PartBytes):
    """An open part whose tensors can be read. Every method raises StorageError for what cannot be read or differs."""

    def __enter__(self) -> PartFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read_small(self) -> dict[str, Tensor]:
        """Return the part's small tensors by name; those of weights come with them."""
        return {name: self.read_tensor(name, place) for name, place in self.manifest.small.items()}

    def read_weight_small(self, place: WeightPlace) -> dict[str, Tensor]:
        """Return a weight's small tensors by role."""
        return {role: self.read_tensor(label(place.name, role), found) for role, found in place.small.items()}

    def read_weight(self, place: WeightPlace) -> MemoryWeight:
        """Return a weight in memory of its own: the pieces as stored, side by side in one allocation per role."""
        roles = place.pieces[0].tensors
        held = {role: torch.empty(_num_bytes(place, role), dtype=torch.uint8) for role in roles}
        pieces = []
        starts = dict.fromkeys(roles, 0)
        for piece in place.pieces:
            views = {role: view_bytes(held[role], starts[role], found) for role, found in piece.tensors.items()}
            pieces.append(self._read_piece(place, piece, views))
            starts = {role: starts[role] + found.num_bytes for role, found in piece.tensors.items()}
        return MemoryWeight(
            place.name, Precision(place.kind), place.shape, self.read_weight_small(place), tuple(pieces)
        )

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

    def _read_piece(self, place: WeightPlace, piece: PiecePlace, views: Mapping[str, Tensor]) -> Piece:
        for role, view in views.items():
            self.read_checked(bytes_of(view), label(place.name, role), piece.tensors[role])
        return Piece(piece.first_row, piece.num_rows, views)


def _num_bytes(place: WeightPlace, role: str) -> int:
    return sum(piece.tensors[role].num_bytes for piece in place.pieces)

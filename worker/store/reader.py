"""Reads a part that was written: every tensor that it returns was compared with its checksum.

Reads here go around the page cache's memory (pages are dropped once copied), since resident weights are held once. What
reads for itself: the ring of `worker.stream` (by `fileno` and the manifest's places), and `read_rows`, which looks up
single rows, smaller than anything that has a checksum; `worker.store.verify` checks a whole part beforehand.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import torch
from torch import Tensor

from cluster.errors import StorageError
from cluster.model_spec import Precision
from worker.store.disk import forget_pages
from worker.store.folder import BlockStore
from worker.store.manifest import PartManifest, PiecePlace, TensorPlace, WeightPlace
from worker.store.tensors import DTYPES, bytes_of, checksum, empty, view_bytes
from worker.stored_weight import MemoryWeight, Piece

READ_BYTES = 8 << 20  # at a time
_WAY_OUT = "it is made again when the model is loaded again"


class PartFile:
    """An open part. Usable from several threads; holds a shared lock, so that `cluster store prune` leaves it alone."""

    def __init__(self, store: BlockStore, part: str) -> None:
        """Open. Raises StorageError when the part is missing or cut short, ConfigurationError of another version."""
        self.manifest: PartManifest = store.manifest(part)
        self.path: Path = store.path(part)
        try:
            self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError(f"{part}: {self.path} cannot be read ({error.strerror}); {_WAY_OUT}") from error
        try:
            self._check_length()
            _share(self._file)
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> PartFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the use of the file."""
        os.close(self._file)

    def fileno(self) -> int:
        """Return the descriptor, for reading at places of the manifest."""
        return self._file

    def read_small(self) -> dict[str, Tensor]:
        """Return the part's small tensors by name; those of weights come with them. Raises StorageError."""
        return {name: self.read_tensor(name, place) for name, place in self.manifest.small.items()}

    def read_weight_small(self, place: WeightPlace) -> dict[str, Tensor]:
        """Return a weight's small tensors by role. Raises StorageError."""
        return {role: self.read_tensor(f"{place.name} ({role})", found) for role, found in place.small.items()}

    def read_weight(self, place: WeightPlace) -> MemoryWeight:
        """Return a weight in memory of its own: pieces as stored, adjacent in one tensor per role.

        Raises StorageError.
        """
        small = self.read_weight_small(place)
        whole = {role: torch.empty(_total_bytes(place, role), dtype=torch.uint8) for role in place.pieces[0].tensors}
        starts = dict.fromkeys(whole, 0)
        pieces = []
        for piece in place.pieces:
            pieces.append(self._read_piece(place, piece, whole, starts))
            starts = {role: start + piece.tensors[role].num_bytes for role, start in starts.items()}
        return MemoryWeight(place.name, Precision(place.kind), place.shape, small, tuple(pieces))

    def read_tensor(self, name: str, place: TensorPlace) -> Tensor:
        """Return a tensor, called `name` in messages. Raises StorageError."""
        return self._read_into(empty(place), name, place)

    def read_rows(self, place: WeightPlace, rows: list[int]) -> Tensor:
        """Return `[len(rows), in]` of a weight that is not quantized, unchecked. Raises StorageError."""
        dtype = place.pieces[0].tensors["weight"].dtype
        out = torch.empty(len(rows), place.shape[1], dtype=DTYPES[dtype])
        view, row_bytes = bytes_of(out), place.shape[1] * out.itemsize
        for index, row in enumerate(rows):
            piece = _piece_of(place, row)
            offset = piece.tensors["weight"].offset + (row - piece.first_row) * row_bytes
            self._fill(view[index * row_bytes : (index + 1) * row_bytes], offset, place.name)
        return out

    def _read_piece(
        self, place: WeightPlace, piece: PiecePlace, whole: dict[str, Tensor], starts: dict[str, int]
    ) -> Piece:
        tensors = {
            role: self._read_into(view_bytes(whole[role], starts[role], found), f"{place.name} ({role})", found)
            for role, found in piece.tensors.items()
        }
        return Piece(piece.first_row, piece.num_rows, tensors)

    def _read_into(self, tensor: Tensor, name: str, place: TensorPlace) -> Tensor:
        data = bytes_of(tensor)
        for start in range(0, len(data), READ_BYTES):
            self._fill(data[start : start + READ_BYTES], place.offset + start, name)
        forget_pages(self._file, place.offset, place.num_bytes)
        if checksum(data) != place.checksum:
            raise self._damaged(name, f"its bytes at {place.offset:,} are not those that were written")
        return tensor

    def _fill(self, data: memoryview, offset: int, name: str) -> None:
        while data:
            try:
                count = os.preadv(self._file, [data], offset)
            except OSError as error:
                raise self._damaged(name, f"reading at byte {offset:,} failed: {error.strerror}") from error
            if count == 0:
                raise self._damaged(name, f"the file ends at byte {offset:,}")
            offset, data = offset + count, data[count:]

    def _check_length(self) -> None:
        length = os.fstat(self._file).st_size
        if length != self.manifest.file_bytes:
            raise StorageError(
                f"{self.manifest.part}: {self.path} has {length:,} bytes instead of {self.manifest.file_bytes:,}; "
                + _WAY_OUT
            )

    def _damaged(self, name: str, what: str) -> StorageError:
        return StorageError(f"{self.manifest.part}: tensor {name} in {self.path} is damaged: {what}; {_WAY_OUT}")


def _share(file: int) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_SH)
    except OSError:
        return  # a file system without locks: reading needs none


def _total_bytes(place: WeightPlace, role: str) -> int:
    return sum(piece.tensors[role].num_bytes for piece in place.pieces)


def _piece_of(place: WeightPlace, row: int) -> PiecePlace:
    return next(piece for piece in place.pieces if piece.first_row <= row < piece.first_row + piece.num_rows)

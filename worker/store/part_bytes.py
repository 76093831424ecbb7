"""An open part as bytes: opened, held against pruning, read and compared with its manifest. Covers no tensors, so that
checking a store needs no torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash

from cluster.errors import StorageError
from worker.store.disk import forget_pages
from worker.store.folder import BlockStore
from worker.store.manifest import PartManifest, TensorPlace

READ_BYTES = 8 << 20  # at a time


class PartBytes:
    """Usable from several threads. Holds a shared lock, so that `cluster store prune` leaves the part alone."""

    def __init__(self, store: BlockStore, part: str) -> None:
        """Open. Raises StorageError when the part is missing or cut short, ConfigurationError of another version."""
        self.manifest: PartManifest = store.manifest(part)
        self.path: Path = store.path(part)
        try:
            self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError(f"{part}: {self.path} cannot be read ({error.strerror})") from error
        try:
            self._check_length()
            store.hold(self._file)
        except BaseException:
            os.close(self._file)
            raise

    def close(self) -> None:
        """End the use of the file."""
        os.close(self._file)

    def fileno(self) -> int:
        """Return the descriptor, for reading at places of the manifest."""
        return self._file

    def check(self, buffer: memoryview, on_bytes: Callable[[int], None] = lambda _: None) -> None:
        """Compare every tensor with its checksum, through `buffer`; `on_bytes` counts. Raises StorageError."""
        for name, place in tensors_of(self.manifest):
            digest = xxhash.xxh3_128()
            for start in range(0, place.num_bytes, len(buffer)):
                data = buffer[: min(len(buffer), place.num_bytes - start)]
                self._fill(data, place.offset + start, name)
                digest.update(data)
                on_bytes(len(data))
            self._finish(digest.hexdigest(), name, place)

    def read_checked(self, data: memoryview, name: str, place: TensorPlace) -> None:
        """Fill `data` with a tensor, called `name` in messages. Raises StorageError."""
        for start in range(0, len(data), READ_BYTES):
            self._fill(data[start : start + READ_BYTES], place.offset + start, name)
        self._finish(xxhash.xxh3_128_hexdigest(data), name, place)

    def _finish(self, checksum: str, name: str, place: TensorPlace) -> None:
        forget_pages(self._file, place.offset, place.num_bytes)
        if checksum != place.checksum:
            raise self._damaged(
                name, f"the {place.num_bytes:,} bytes at {place.offset:,} are not those that were written"
            )

    def _fill(self, data: memoryview, offset: int, name: str) -> None:
        while data:
            try:
                count = os.preadv(self._file, [data], offset)
            except OSError as error:
                raise self._damaged(name, f"reading at byte {offset:,} failed ({error.strerror})") from error
            if count == 0:
                raise self._damaged(name, f"the file ends at byte {offset:,}")
            offset, data = offset + count, data[count:]

    def _check_length(self) -> None:
        length = os.fstat(self._file).st_size
        if length != self.manifest.file_bytes:
            raise StorageError(
                f"{self.manifest.part}: {self.path} has {length:,} bytes instead of {self.manifest.file_bytes:,}"
            )

    def _damaged(self, name: str, what: str) -> StorageError:
        return StorageError(f"{self.manifest.part}: tensor {name} in {self.path} is damaged: {what}")


def tensors_of(manifest: PartManifest) -> Iterator[tuple[str, TensorPlace]]:
    """Yield every tensor of a part with its name in messages."""
    yield from manifest.small.items()
    for weight in manifest.weights:
        for role, place in weight.small.items():
            yield label(weight.name, role), place
        for piece in weight.pieces:
            for role, place in piece.tensors.items():
                yield label(weight.name, role), place


def label(name: str, role: str) -> str:
    """Name a tensor of a weight in a message."""
    return name if role == "weight" else f"{name} ({role})"

"""A part's file in the block store, open for reading, and the extents of it that are read at once.

Covers one read and what its bytes must be; when to read, and into which memory, is `worker.stream.readers`'.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from cluster.errors import StorageError
from worker.store.folder import hold_shared
from worker.store.manifest import ALIGNMENT, PartManifest, PiecePlace

FOLIO_BYTES = 4 << 20  # at most, of what the page cache holds, and lets go of, as one

ReadAt = Callable[[int, Sequence[memoryview], int], int]
"""`os.preadv`."""


class StreamedFile:
    """Opened when first read. Threads may read at the same time; close it when none does."""

    def __init__(self, part: str, path: Path, *, is_direct: bool, read_at: ReadAt = os.preadv) -> None:
        """`is_direct` bypasses the page cache."""
        self.part, self.path = part, path
        self._is_direct, self._read_at = is_direct, read_at
        self._lock = threading.Lock()
        self._descriptor = -1
        self._identity = (0, 0)
        self._is_suspect = True  # not opened yet, or the last read failed: the file may have been replaced
        self.has_failed = False  # a read did, or brought what was not written, since the file was made again

    def read(self, memory: memoryview, offset: int) -> None:
        """Fill `memory` from `offset` on; both are aligned. Raises StorageError without naming tensors."""
        try:
            self._fill(self._open(), memory, offset)
        except OSError as error:
            self.suspect()
            raise StorageError(self.damage(error.strerror or str(error))) from error

    def forget(self, offset: int, num_bytes: int) -> None:
        """Let the page cache forget these bytes, all of which were read.

        It lets go of whole folios alone, which reads ahead make larger than reads are, so that forgetting read by read
        would leave all of them; and one may have begun before these bytes. Where a file system takes no such advice, it
        keeps what it likes.
        """
        with self._lock, suppress(OSError):
            if not self._is_direct and self._descriptor >= 0:
                start = max(0, offset - FOLIO_BYTES)
                os.posix_fadvise(self._descriptor, start, offset + num_bytes - start, os.POSIX_FADV_DONTNEED)

    def suspect(self) -> None:
        """Open the file again at the next read: what it holds is not what was written."""
        self._is_suspect = self.has_failed = True

    def made_again(self) -> None:
        """Take the file for a new one."""
        self._is_suspect, self.has_failed = True, False

    def damage(self, what: str) -> str:
        """Return a message about this file."""
        return f"{self.part} cannot be read from {self.path}: {what}"

    def close(self) -> None:
        """Idempotent; reading opens the file again."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
            self._descriptor, self._is_suspect = -1, True

    def _open(self) -> int:
        with self._lock:
            if self._is_suspect or self._is_replaced():
                opened = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if self._is_direct else 0))
                hold_shared(opened)
                self._descriptor = _replace(self._descriptor, opened)
                self._identity, self._is_suspect = _identity(os.fstat(self._descriptor)), False
            return self._descriptor

    def _is_replaced(self) -> bool:
        """Tell whether the path has another file now. One that has none leaves what is open as it was."""
        try:
            return _identity(os.stat(self.path)) != self._identity
        except OSError:
            return False

    def _fill(self, descriptor: int, memory: memoryview, offset: int) -> None:
        num_read = 0
        while num_read < len(memory):
            count = self._read_at(descriptor, [memory[num_read:]], offset + num_read)
            num_read += count
            if count == 0 or (self._is_direct and count % ALIGNMENT and num_read < len(memory)):
                self.suspect()
                num_bytes = os.fstat(descriptor).st_size
                raise StorageError(self.damage(f"it ends after {num_bytes:,} bytes, so it was cut short"))


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _replace(descriptor: int, opened: int) -> int:
    """Let `descriptor` mean the file `opened`: another thread may be reading from it, so it must not be closed."""
    if descriptor < 0:
        return opened
    os.dup2(opened, descriptor, inheritable=False)
    os.close(opened)
    return descriptor


@dataclass(frozen=True, slots=True)
class Check:
    """A tensor within an extent, and what its bytes must give."""

    tensor: str
    start: int  # from the beginning of the extent
    num_bytes: int
    checksum: str


@dataclass(frozen=True, slots=True, eq=False)
class Extent:
    """Adjacent bytes of a file that are read and verified at once. Compared by identity."""

    file: StreamedFile
    offset: int
    num_bytes: int
    checks: tuple[Check, ...]

    def read(self, memory: memoryview, start: int, stop: int) -> None:
        """Read bytes `[start, stop)` of the extent to where they belong in `memory`. Raises StorageError."""
        try:
            self.file.read(memory[start:stop], self.offset + start)
        except StorageError as error:
            touched = [c.tensor for c in self.checks if c.start < stop and c.start + c.num_bytes > start]
            raise StorageError(f"{', '.join(touched)} of {error.message}") from error

    def forget(self) -> None:
        """Let the page cache forget what was read, as soon as all of it was."""
        self.file.forget(self.offset, self.num_bytes)

    def verify(self, memory: memoryview) -> None:
        """Raise StorageError unless every tensor's bytes are those that were written."""
        for check in self.checks:
            if xxhash.xxh3_128_hexdigest(memory[check.start : check.start + check.num_bytes]) != check.checksum:
                self.file.suspect()
                raise StorageError(f"{check.tensor} of {self.file.damage('its checksum is wrong')}")


def slice_extents(manifest: PartManifest, file: StreamedFile) -> tuple[Extent, ...]:
    """Return one extent per slice of a part."""
    return tuple(_extent(manifest, file, index, index) for index in range(len(manifest.slices)))


def expert_extents(manifest: PartManifest, file: StreamedFile) -> dict[int, Extent]:
    """Return one extent per expert of a block: its slices are adjacent."""
    experts: dict[int, list[int]] = {}
    for index, place in enumerate(manifest.slices):
        if place.expert is not None:
            experts.setdefault(place.expert, []).append(index)
    return {expert: _extent(manifest, file, indexes[0], indexes[-1]) for expert, indexes in experts.items()}


def _extent(manifest: PartManifest, file: StreamedFile, first: int, last: int) -> Extent:
    offset = manifest.slices[first].offset
    stop = manifest.slices[last].offset + manifest.slices[last].num_bytes
    checks = tuple(
        check
        for weight in manifest.weights
        for piece in weight.pieces
        if first <= piece.slice_index <= last
        for check in _checks(weight.name, piece, offset)
    )
    return Extent(file, offset, stop - offset, checks)


def _checks(name: str, piece: PiecePlace, offset: int) -> list[Check]:
    return [
        Check(f"{name}.{role}", place.offset - offset, place.num_bytes, place.checksum)
        for role, place in piece.tensors.items()
    ]

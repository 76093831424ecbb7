"""A file of which only some byte ranges are here: sparse, resumable, and safe to share between processes.

The ranges that are complete stand in a sidecar, one line each, appended after their bytes have reached the disk; a
crash loses at most what was under way. Two processes may fill the same file at once: they write equal bytes, because
the folder's name is the digest of the checkpoint.
"""

from __future__ import annotations

import os
from pathlib import Path


class PartialFile:
    """A file as large as the whole one, with holes. Usable from several threads: a write is one system call."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        """Open or create. Raises OSError."""
        self.path = path
        self.size_bytes = size_bytes
        self._sidecar = _sidecar(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if os.fstat(self._file).st_size != size_bytes:
            os.truncate(self._file, size_bytes)
        self._complete = _read_ranges(self._sidecar)

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def has(self, start: int, end: int) -> bool:
        """Tell whether exactly this range was completed, by whichever process."""
        return (start, end) in self._complete

    def read(self, start: int, end: int) -> bytes:
        return os.pread(self._file, end - start, start)

    def write(self, start: int, data: bytes) -> None:
        """Write bytes of a range that is not complete yet."""
        view = memoryview(data)
        while view:
            written = os.pwrite(self._file, view, start)
            start, view = start + written, view[written:]

    def complete(self, start: int, end: int) -> None:
        """Note, durably, that a range is here."""
        os.fdatasync(self._file)
        sidecar = os.open(self._sidecar, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(sidecar, f"{start} {end}\n".encode())
        finally:
            os.close(sidecar)
        self._complete.add((start, end))


def delete_partial_file(path: Path) -> None:
    """Delete a file, what is known about it first: a crash in between must not leave ranges that are not there."""
    _sidecar(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".ranges")


def _read_ranges(sidecar: Path) -> set[tuple[int, int]]:
    if not sidecar.exists():
        return set()
    lines = sidecar.read_text().split("\n")[:-1]  # what follows the last newline was cut off by a crash
    fields = [line.split() for line in lines]
    return {(int(pair[0]), int(pair[1])) for pair in fields if len(pair) == 2}

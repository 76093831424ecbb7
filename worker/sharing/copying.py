"""Files that belong together, copied from another worker: whole and checked, or not there.

They arrive under temporary names, each of which one process writes at a time, of all that share the folder. Covers the
copy; `worker.sharing.holders` decides whom to ask.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cluster.errors import StageUnavailableError
from worker.store.disk import partial

RANGE_BYTES = 64 << 20
_POLL_SECONDS = 0.2

ReadRange = Callable[[str, int, int], Iterator[bytes]]
"""Yields the bytes `[start, end)` of a file by its name, in order. Raises SpanwiseError."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Files of a collection that belong together. The last one says that all are there, and stands for them in claims.

    `check` is called when all are here under their temporary names (`worker.store.disk.partial`): it raises
    StorageError unless they are as they should be.
    """

    collection: str
    names: tuple[str, ...]
    folder: Path
    check: Callable[[], None]

    @property
    def is_here(self) -> bool:
        """Tell whether the files are there, whoever brought them."""
        return (self.folder / self.names[-1]).exists()


def copy_files(wanted: Wanted, sizes: Mapping[str, int], read: ReadRange, on_bytes: Callable[[int], None]) -> None:
    """Copy files, unless another process does so first. `on_bytes` counts, 0 while that one is waited for.

    Raises SpanwiseError when they cannot be read or are not as they should be, OSError when they cannot be written.
    """
    paths = [wanted.folder / name for name in wanted.names]
    with ExitStack() as stack:
        files = [stack.enter_context(_written_alone(partial(path), on_bytes)) for path in paths]
        if wanted.is_here:
            return
        for file, name in zip(files, wanted.names, strict=True):
            _fill(file, name, sizes[name], read, on_bytes)
        wanted.check()
        for path in paths:
            partial(path).replace(path)


def _fill(file: BinaryIO, name: str, size_bytes: int, read: ReadRange, on_bytes: Callable[[int], None]) -> None:
    for start in range(0, size_bytes, RANGE_BYTES):
        with closing(read(name, start, min(start + RANGE_BYTES, size_bytes))) as pieces:  # type: ignore[type-var]
            for data in pieces:
                file.write(data)
                on_bytes(len(data))
    file.flush()
    os.fsync(file.fileno())
    if file.tell() != size_bytes:
        raise StageUnavailableError(f"{file.tell():,} of {size_bytes:,} bytes of {name} came")


@contextmanager
def _written_alone(path: Path, on_wait: Callable[[int], None]) -> Iterator[BinaryIO]:
    """Give an empty file that no other process writes; it is removed unless it was renamed meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while (file := _try_open(path)) is None:
        on_wait(0)
        time.sleep(_POLL_SECONDS)
    with file:
        file.truncate(0)
        try:
            yield file
        finally:
            if _is_named(file, path):
                path.unlink(missing_ok=True)


def _try_open(path: Path) -> BinaryIO | None:
    """Open a file and lock it as long as it is open; None while another process does."""
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:
        return file  # a file system without locks
    if _is_named(file, path):
        return file
    file.close()  # renamed or removed by the one that had it locked
    return None


def _is_named(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False

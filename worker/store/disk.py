"""Writing to a disk so that a crash leaves either all of a file or nothing. Covers system calls, their seam, and what
is said when they fail.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from cluster.errors import ConfigurationError

PARTIAL = ".part"  # what names of files end with before they are whole
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Disk(Protocol):
    """What writing needs of a file system. Every method may raise OSError."""

    def create(self, path: Path) -> int:
        """Open a file for writing, empty, whether it existed or not; return its descriptor."""
        ...

    def write(self, file: int, data: memoryview, offset: int) -> int:
        """Write some of `data`; return how many bytes."""
        ...

    def sync(self, file: int) -> None:
        """Return when what was written is on the disk; its pages need not stay in memory."""
        ...

    def replace(self, source: Path, target: Path) -> None:
        """Rename within a folder, durably."""
        ...


class SystemDisk:
    """This machine's."""

    def create(self, path: Path) -> int:
        """See Disk."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)

    def write(self, file: int, data: memoryview, offset: int) -> int:
        """See Disk."""
        return os.pwrite(file, data, offset)

    def sync(self, file: int) -> None:
        """See Disk."""
        os.fsync(file)
        forget_pages(file)

    def replace(self, source: Path, target: Path) -> None:
        """See Disk."""
        os.replace(source, target)
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_all(disk: Disk, file: int, data: memoryview, offset: int) -> None:
    """Write all of `data`. Raises OSError."""
    while data:
        written = disk.write(file, data, offset)
        offset, data = offset + written, data[written:]


def partial(path: Path) -> Path:
    """Return what a file is called before it is whole."""
    return path.with_name(path.name + PARTIAL)


def write_partial(disk: Disk, path: Path, data: bytes) -> None:
    """Write a small file under its partial name, durably. Raises OSError."""
    file = disk.create(partial(path))
    try:
        write_all(disk, file, memoryview(data), 0)
        disk.sync(file)
    finally:
        os.close(file)


@contextmanager
def disk_errors(what: str, folder: Path) -> Iterator[None]:
    """Turn OSError into ConfigurationError. `what` says what was to be written, like "block-0007 (2.30 GiB)"."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise ConfigurationError(
                f"the disk is full: {what} does not fit in {folder}, and nothing of it was kept: make room (`cluster "
                "store prune` removes other models), or choose a folder on a larger disk with --store-dir or --output"
            ) from error
        raise ConfigurationError(
            f"{what} cannot be written in {folder} ({error.strerror}): make the folder writable, or choose another "
            "one with --store-dir or --output"
        ) from error


def forget_pages(file: int, offset: int = 0, num_bytes: int = 0) -> None:
    """Let the page cache drop what was read or written: weights are held elsewhere. 0 bytes: to the end."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, offset, num_bytes, os.POSIX_FADV_DONTNEED)

"""Writing to a disk so that a crash leaves either all of a file or nothing. Covers system calls and their seam."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol


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
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)

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


def forget_pages(file: int, offset: int = 0, num_bytes: int = 0) -> None:
    """Let the page cache drop what was read or written: weights are held elsewhere. 0 bytes: to the end."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, offset, num_bytes, os.POSIX_FADV_DONTNEED)

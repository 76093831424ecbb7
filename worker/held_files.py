"""Downloaded files that several workers of a machine may use, so that one that discards them waits for the others.

Whoever uses a file holds a shared lock of the system's (flock) on a small file beside it; who wants to delete it needs
that lock alone. Locks end with their process, however that ends. Covers locks, not what is downloaded.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable
from pathlib import Path


class HeldFiles:
    """Some files, by name, that nobody discards meanwhile. Where no lock can be written nothing can be deleted either,
    and nothing is held."""

    def __init__(self, locks: Path, names: Iterable[str]) -> None:
        """`locks` is the folder of the locks."""
        self._descriptors = {name: _lock(locks, name, fcntl.LOCK_SH) for name in names}
        # which waits only while another process deletes a file

    def release(self, name: str) -> None:
        """No longer hold one of the files. Idempotent."""
        descriptor = self._descriptors.pop(name, None)
        if descriptor is not None:
            os.close(descriptor)

    def close(self) -> None:
        """Hold nothing any more. Idempotent."""
        for name in list(self._descriptors):
            self.release(name)


def discard_file(locks: Path, name: str, delete: Callable[[], None]) -> None:
    """Call `delete` unless somebody holds the file."""
    descriptor = _lock(locks, name, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if descriptor is not None:
        try:
            delete()
        finally:
            os.close(descriptor)


def _lock(locks: Path, name: str, how: int) -> int | None:
    """Return a descriptor that holds the lock until it is closed; None where that is not possible."""
    try:
        locks.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(locks / (name.replace("/", "--") + ".lock"), flags, 0o666)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, how)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor

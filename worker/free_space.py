"""Is there room for a download? Asked before it begins, since a full disk hours later helps nobody."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from cluster.errors import ConfigurationError

FreeBytes = Callable[[Path], int]
"""Returns the bytes that may still be written below a folder that exists."""

RequireSpace = Callable[[Path, int], None]
"""Raises ConfigurationError unless so many bytes may be downloaded to a folder, which need not exist yet."""

_GIB = 1 << 30


def free_bytes(folder: Path) -> int:
    """Return what this machine's file system says."""
    return shutil.disk_usage(folder).free


def require_space(folder: Path, needed_bytes: int, *, measure: FreeBytes, reserve_bytes: int = 0) -> None:
    """See RequireSpace; `reserve_bytes` of the disk stay free."""
    if not needed_bytes:
        return
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    available = measure(existing)
    if needed_bytes + reserve_bytes > available:
        reserve = (
            f", of which {reserve_bytes / _GIB:.2f} GiB are to stay free (--disk-reserve)" if reserve_bytes else ""
        )
        raise ConfigurationError(
            f"the weights of this span need {needed_bytes / _GIB:.2f} GiB in {folder}, which has "
            f"{available / _GIB:.2f} GiB free{reserve}: make room, or set --download-dir to a folder on a larger disk"
        )

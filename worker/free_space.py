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
        reserve = f", of which {_text(reserve_bytes)} are to stay free (--disk-reserve)" if reserve_bytes else ""
        raise ConfigurationError(
            f"the weights of this span need {_text(needed_bytes)} in {folder}, which has "
            f"{_text(available)} free{reserve}: make room, or set --download-dir to a folder on a larger disk"
        )


def _text(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB"

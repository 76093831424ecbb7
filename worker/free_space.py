"""Is there room for a download? Asked before it begins, since a full disk hours later helps nobody."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from cluster.errors import ConfigurationError

FreeBytes = Callable[[Path], int]
"""Returns the bytes that may still be written below a folder that exists."""

_GIB = 1 << 30


def free_bytes(folder: Path) -> int:
    """Return what this machine's file system says."""
    return shutil.disk_usage(folder).free


def require_space(folder: Path, needed_bytes: int, setting: str, measure: FreeBytes) -> None:
    """Raise ConfigurationError unless `needed_bytes` fit below `folder`, which need not exist yet."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    available = measure(existing)
    if needed_bytes > available:
        raise ConfigurationError(
            f"the weights of this span need {needed_bytes / _GIB:.2f} GiB in {folder}, which has "
            f"{available / _GIB:.2f} GiB free: make room, or set {setting} to a folder on a larger disk"
        )

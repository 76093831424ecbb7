"""Is there room in the block store? Asked before anything is written to it. Covers the quota and the disks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from cluster.errors import ConfigurationError
from cluster.load_order import StoreOptions
from worker.free_space import FreeBytes, require_space

_GIB = 1 << 30


def require_all_room(
    root: Path,
    needed_bytes: int,
    options: StoreOptions,
    measure: FreeBytes,
    *,
    download_folder: Path | None = None,
    download_bytes: int = 0,
) -> None:
    """As require_room, with the limits of `options`; `download_bytes` go to `download_folder`, on whichever disk."""
    is_one_disk = download_folder is not None and _device(root) == _device(download_folder)
    if download_folder is not None and not is_one_disk:
        require_space(download_folder, download_bytes, measure=measure, reserve_bytes=options.reserve_bytes)
    require_room(
        root,
        needed_bytes,
        source_bytes=download_bytes if is_one_disk else 0,
        quota_bytes=options.quota_bytes,
        reserve_bytes=options.reserve_bytes,
        measure=measure,
    )


def require_room(
    root: Path,
    needed_bytes: int,
    *,
    source_bytes: int = 0,
    quota_bytes: int = 0,
    reserve_bytes: int = 0,
    measure: FreeBytes,
) -> None:
    """Raise ConfigurationError unless `needed_bytes` more fit in the block store below `root`, which need not exist.

    `source_bytes` will be downloaded to the same disk besides; `quota_bytes` is the most that the store may take, 0
    for no such limit; `reserve_bytes` of the disk stay free.
    """
    if quota_bytes:
        _require_quota(root, needed_bytes, quota_bytes)
    available = measure(_existing(root))
    if needed_bytes + source_bytes + reserve_bytes > available:
        source = f", and the {_text(source_bytes)} of the checkpoint to be downloaded," if source_bytes else ""
        reserve = f", of which {_text(reserve_bytes)} are to stay free (--disk-reserve)" if reserve_bytes else ""
        raise ConfigurationError(
            f"the {_text(needed_bytes)} to be stored{source} do not fit the block store in {root}, whose disk has "
            f"{_text(available)} free{reserve}: make room (`cluster store prune` removes other models), or choose a "
            "folder on a larger disk with --store-dir"
        )


def _require_quota(root: Path, needed_bytes: int, quota_bytes: int) -> None:
    taken = used_bytes(root)
    if taken + needed_bytes > quota_bytes:
        raise ConfigurationError(
            f"the block store in {root} may take {_text(quota_bytes)} and has taken {_text(taken)}: the "
            f"{_text(needed_bytes)} to be stored do not fit; remove other models with `cluster store prune`, or "
            "raise --store-quota"
        )


def used_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder, which need not exist; files that vanish meanwhile count as none."""
    return sum(_sizes(folder))


def _sizes(folder: Path) -> Iterator[int]:
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                yield os.lstat(path).st_size
        except OSError:
            continue


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())


def _device(folder: Path) -> int:
    return _existing(folder).stat().st_dev


def _text(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB"

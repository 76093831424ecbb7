"""Is there room in the block store? Asked before anything is written to it, and kept until it is written.

Covers the quota and the disks. What other processes promised (`worker.store.promises`) counts as taken: for each file
that is not there, what it lacks.
"""

from __future__ import annotations

import os
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import ConfigurationError
from cluster.load_order import StoreOptions
from worker.free_space import FreeBytes, require_space
from worker.store.disk import partial
from worker.store.promises import SUFFIX, Promise, announced, read_promises

_GIB = 1 << 30


@contextmanager
def promised_room(
    root: Path,
    parts: Mapping[Path, int],
    options: StoreOptions,
    measure: FreeBytes,
    downloads: Mapping[Path, int] | None = None,
) -> Iterator[None]:
    """Have room within the block for files of these sizes: parts of the store below `root`, which need not exist, and
    downloads, on whichever disk. Those on another one are not promised. Raises ConfigurationError."""
    downloads = downloads or {}
    folders = {path.parent for path in downloads}
    if any(_device(folder) != _device(root) for folder in folders):
        require_space(min(folders), sum(downloads.values()), measure=measure, reserve_bytes=options.reserve_bytes)
        downloads = {}
    own = Promise(_by_name(root, parts), _by_name(root, downloads))
    with announced(root, own):
        promises = [own, *read_promises(root)]
        if options.quota_bytes:
            _require_quota(root, promises, options.quota_bytes)
        _require_disk(root, promises, options.reserve_bytes, measure)
        yield


def _require_disk(root: Path, promises: Sequence[Promise], reserve_bytes: int, measure: FreeBytes) -> None:
    own = promises[0]
    needed, source = _lacking(root, own.parts), _lacking(root, own.downloads)
    others = _lacking(root, *_all(promises)) - needed - source
    available = measure(_existing(root))
    if needed + source + others + reserve_bytes > available:
        besides = f", and the {_text(source)} of the checkpoint to be downloaded," if source else ""
        taken = [f"{_text(reserve_bytes)} are to stay free (--disk-reserve)"] if reserve_bytes else []
        taken += [f"{_text(others)} are for what other workers are about to write"] if others else []
        raise ConfigurationError(
            f"the {_text(needed)} to be stored{besides} do not fit the block store in {root}, whose disk has "
            f"{_text(available)} free{', of which ' if taken else ''}{' and '.join(taken)}: make room (`cluster store "
            "prune` removes other models), or choose a folder on a larger disk with --store-dir or --output"
        )


def _require_quota(root: Path, promises: Sequence[Promise], quota_bytes: int) -> None:
    needed = _lacking(root, promises[0].parts)
    others = _lacking(root, *(promise.parts for promise in promises)) - needed
    taken = used_bytes(root)
    if taken + needed + others > quota_bytes:
        besides = f", and other workers are about to write {_text(others)}" if others else ""
        raise ConfigurationError(
            f"the block store in {root} may take {_text(quota_bytes)} and has taken {_text(taken)}{besides}: the "
            f"{_text(needed)} to be stored do not fit; remove other models with `cluster store prune`, or raise "
            "--store-quota"
        )


def _all(promises: Sequence[Promise]) -> Iterator[Mapping[str, int]]:
    for promise in promises:
        yield from (promise.parts, promise.downloads)


def _by_name(root: Path, sizes: Mapping[Path, int]) -> dict[str, int]:
    """Name files below `root` from there, since machines that share it may see it at different paths."""
    return {
        str(path.relative_to(root) if path.is_relative_to(root) else path.absolute()): size
        for path, size in sizes.items()
    }


def _lacking(root: Path, *promised: Mapping[str, int]) -> int:
    """Return the bytes that are still to be written of promised files; one that several will write counts once."""
    wanted = ChainMap(*map(dict, promised))
    return sum(max(0, size - _written(root / name, size)) for name, size in wanted.items())


def _written(path: Path, size: int) -> int:
    if path.exists():
        return size  # which may be an estimate: what is there is whole
    try:
        return partial(path).stat().st_size
    except OSError:
        return 0


def used_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder, which need not exist; files that vanish meanwhile count as none."""
    return sum(_sizes(folder))


def _sizes(folder: Path) -> Iterator[int]:
    for path in folder.rglob("*"):
        try:
            if path.is_file() and path.suffix != SUFFIX:
                yield os.lstat(path).st_size
        except OSError:
            continue


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())


def _device(folder: Path) -> int:
    return _existing(folder).stat().st_dev


def _text(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB"

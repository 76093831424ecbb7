"""All converted checkpoints of a block store: what is there, how large, and removing it.

Removes nothing of a folder that a process converts to, loads from or reads, and tells it. A model that is in memory
already needs its folder no more, but for the embedding, which stays on the disk. Covers folders of
`worker.store.folder`; anything else below the store's root is left alone.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import NotFoundError
from worker.store.disk import PARTIAL, disk_errors
from worker.store.folder import DESCRIPTION, LOCK, MANIFEST, WEIGHTS, BlockStore, StoreDescription
from worker.store.key import all_parts, is_part
from worker.store.manifest import FORMAT_VERSION
from worker.store.room import used_bytes

_DESCRIPTION_STEM = DESCRIPTION.partition(".")[0]
_SUFFIXES = (WEIGHTS, MANIFEST, LOCK, PARTIAL)


@dataclass(frozen=True, slots=True)
class StoreEntry:
    """One folder of the block store."""

    store: BlockStore
    description: StoreDescription | None  # None: the folder does not say
    parts: tuple[str, ...]  # that were written
    damaged: tuple[str, ...]  # of these, what is no longer there or not in its full size
    num_bytes: int  # on the disk, leftovers included
    num_leftovers: int  # files of conversions that were killed, or are under way
    leftover_bytes: int
    last_used: float  # seconds since 1970

    @property
    def key(self) -> str:
        return self.store.key

    @property
    def missing(self) -> tuple[str, ...]:
        """The parts that another use of the whole model would convert."""
        expected = all_parts(self.description.num_blocks) if self.description else []
        return tuple(part for part in expected if part not in self.parts or part in self.damaged)

    @property
    def is_other_version(self) -> bool:
        """Whether another version of Spanwise wrote it, so that this one cannot use it."""
        return _is_other_version(self.description)


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was removed of a folder, and what stayed since it is in use: KEY for all of it, or KEY/PART."""

    num_bytes: int
    in_use: tuple[str, ...] = ()


def list_entries(root: Path) -> list[StoreEntry]:
    """Return the folders of a store, the one used last first."""
    found = (_entry(BlockStore(root, path.name)) for path in root.glob("*") if path.is_dir())
    return sorted((entry for entry in found if entry is not None), key=lambda entry: -entry.last_used)


def find_entries(root: Path, name: str) -> list[StoreEntry]:
    """Return the folders that a key, the beginning of just one, or a model's name means. Raises NotFoundError."""
    entries = list_entries(root)
    exact = [entry for entry in entries if entry.key == name]
    named = [entry for entry in entries if entry.description is not None and entry.description.model == name]
    begun = [entry for entry in entries if name and entry.key.startswith(name)]
    if not (exact or named or begun):
        raise NotFoundError(f"nothing in the block store in {root} is called '{name}': `cluster store list` shows it")
    if not (exact or named) and len(begun) > 1:
        raise NotFoundError(f"{name} could mean {', '.join(entry.key for entry in begun)}: say more of the name")
    return exact or named or begun


def prune(entry: StoreEntry) -> Pruned:
    """Remove a folder, or nothing of it where it is in use. Raises ConfigurationError."""
    store = entry.store
    hold = store.hold_folder_alone()
    if hold is None:
        return Pruned(0, (entry.key,))
    with closing(hold), disk_errors(entry.key, store.root):
        before, stems = used_bytes(store.folder), _stems(store)
        if any(_is_in_use(store, part) for part in stems):
            return Pruned(0, (entry.key,))
        for part in sorted(stems, key=lambda stem: stem == _DESCRIPTION_STEM):  # which tells what the others are
            store.remove(part)
            (store.folder / (part + LOCK)).unlink(missing_ok=True)
        _remove_folder(store.folder)
    return Pruned(before - used_bytes(store.folder))


def prune_leftovers(entry: StoreEntry) -> Pruned:
    """Remove what killed conversions left in a folder. Raises ConfigurationError."""
    store = entry.store
    before = used_bytes(store.folder)
    with disk_errors(entry.key, store.root):
        unfinished = [part for part in _stems(store) if store.leftovers(part)]
        in_use = tuple(f"{entry.key}/{part}" for part in unfinished if not _remove_leftovers(store, part))
    return Pruned(before - used_bytes(store.folder), in_use)


def remove_parts(store: BlockStore, parts: Sequence[str]) -> list[str]:
    """Remove parts, so that the next use makes them anew; return those that another process is converting just now."""
    busy = []
    for part in parts:
        lock = store.try_lock(part)
        if lock is None:
            busy.append(part)
            continue
        try:
            store.remove(part)
        finally:
            os.close(lock)
    return busy


def _entry(store: BlockStore) -> StoreEntry | None:
    """Return None for a folder that is not ours, not readable, or removed meanwhile."""
    try:
        return _describe(store) if _is_ours(store) else None
    except OSError:
        return None


def _describe(store: BlockStore) -> StoreEntry:
    leftovers = [path for part in _stems(store) for path in store.leftovers(part)]
    description, parts = store.description(), tuple(store.parts())
    damaged = () if _is_other_version(description) else tuple(part for part in parts if not store.has(part))
    return StoreEntry(
        store,
        description,
        parts,
        damaged,
        used_bytes(store.folder),
        len(leftovers),
        sum(path.stat().st_size for path in leftovers if path.exists()),
        _last_used(store.folder),
    )


def _is_other_version(description: StoreDescription | None) -> bool:
    return description is not None and description.version != FORMAT_VERSION


def _is_ours(store: BlockStore) -> bool:
    return store.description() is not None or any(is_part(stem) for stem in _stems(store))


def _last_used(folder: Path) -> float:
    described = folder / DESCRIPTION
    return (described if described.exists() else folder).stat().st_mtime


def _stems(store: BlockStore) -> list[str]:
    """Return the names of parts, and of the description, of which any file is there."""
    names = {path.name for path in store.folder.iterdir() if path.suffix in _SUFFIXES}
    stems = {name.partition(".")[0] for name in names}
    return sorted(stem for stem in stems if is_part(stem) or stem == _DESCRIPTION_STEM)


def _is_in_use(store: BlockStore, part: str) -> bool:
    lock = store.try_lock(part)
    if lock is None:
        return True
    os.close(lock)
    return _is_read(store.path(part))


def _remove_leftovers(store: BlockStore, part: str) -> bool:
    lock = store.try_lock(part)
    if lock is None:
        return False
    try:
        store.remove_leftovers(part)
    finally:
        os.close(lock)
    return True


def _is_read(path: Path) -> bool:
    """Tell whether a process holds a part's file open for its model."""
    if not path.exists():
        return False
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def _remove_folder(folder: Path) -> None:
    """Remove an empty folder; one with other files, or in which a conversion has just begun, stays."""
    try:
        folder.rmdir()
    except OSError:
        return

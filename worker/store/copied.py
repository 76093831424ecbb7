"""The parts of a checkpoint that comes converted: used where they are, or brought whole from where they are.

Covers folders that `cluster convert --output` made. Nothing in a user's folder is changed.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Protocol

from cluster.errors import ConfigurationError, StorageError
from cluster.hub.layout import is_part_file, part_files
from cluster.load_order import LoadOrder, LoadProgress
from cluster.model_spec import CheckpointFile, FolderSource
from worker.architectures.base import Part
from worker.free_space import FreeBytes, free_bytes
from worker.sharing.holders import Neighbours
from worker.sharing.parts import borrow_part
from worker.store.folder import BlockStore, describe_source, open_store
from worker.store.key import default_store_folder, store_key
from worker.store.room import promised_room
from worker.store.verify import verify_part
from worker.store.writer import copy_part
from worker.weights import CheckpointSource, is_here


class Filler(Protocol):
    """What makes parts of a store."""

    def fill(self, parts: Sequence[Part]) -> None:
        """Make the missing ones. Raises SpanwiseError."""
        ...

    def rebuild(self, part: Part, error: StorageError) -> None:
        """Make a damaged one again. Raises `error` where that is not possible."""
        ...


def is_converted(order: LoadOrder) -> bool:
    """Tell whether the order's source holds parts rather than a checkpoint."""
    return any(is_part_file(file.name) for file in order.weight_files)


def store_of(order: LoadOrder) -> BlockStore:
    """Return the store that holds an order's parts, or will."""
    found = locate_store(order)
    return found if _is_used_in_place(order) else open_store(found.root, order.source, order.precision)


def locate_store(order: LoadOrder) -> BlockStore:
    """Return the same, whether it is of this version or not."""
    if _is_used_in_place(order):
        folder = Path(order.source.path)  # type: ignore[union-attr]  # a folder's
        return BlockStore(folder.parent, folder.name)
    root = Path(order.store.store_folder) if order.store.store_folder else default_store_folder()
    return BlockStore(root, store_key(order.source, order.precision))


def _is_used_in_place(order: LoadOrder) -> bool:
    return is_converted(order) and isinstance(order.source, FolderSource) and is_here(order.source)


class CopiedStore:
    """The Filler of a source that is converted already."""

    def __init__(
        self,
        order: LoadOrder,
        num_blocks: int,
        store: BlockStore,
        open_source: Callable[[], CheckpointSource],
        on_progress: Callable[[LoadProgress], None],
        neighbours: Neighbours,
        measure: FreeBytes = free_bytes,
    ) -> None:
        self._order, self._num_blocks, self._store, self._neighbours = order, num_blocks, store, neighbours
        self._open_source, self._on_progress, self._measure = open_source, on_progress, measure
        self._is_in_place = _is_used_in_place(order)

    def fill(self, parts: Sequence[Part]) -> None:
        """See Filler."""
        missing = [part.name for part in parts if not self._is_there(part.name)]
        if not missing:
            return
        files = {part: self._files_of(part) for part in missing}
        with self._room(files):
            self._store.describe(describe_source(self._order.source, self._order.precision, self._num_blocks))
            files = {part: found for part, found in files.items() if not self._borrow(part, found)}
            if files:
                self._bring_all(files)

    def rebuild(self, part: Part, error: StorageError) -> None:
        """See Filler."""
        if self._is_in_place:
            raise StorageError(
                f"{error.message}; that folder holds no checkpoint to make it from: copy {part.name} there again, or "
                "make the folder anew with `cluster convert`"
            ) from error
        remove_damaged(self._store, part.name)
        self.fill([part])
        self._refuse_damaged_download(part.name)

    def _is_there(self, part: str) -> bool:
        """Tell whether a part need not be brought. Where it cannot be, opening it tells what is wrong with it."""
        return self._store.manifest_path(part).exists() if self._is_in_place else self._store.has(part)

    def _files_of(self, part: str) -> list[CheckpointFile]:
        wanted = part_files(part)
        found = {file.name: file for file in self._order.weight_files}
        missing = [name for name in wanted if name not in found or self._is_in_place]
        if missing:
            raise ConfigurationError(
                f"{' and '.join(missing)} are missing in the converted checkpoint {self._store.folder}: convert "
                "those blocks too (`cluster convert --blocks`), or copy them there"
            )
        return [found[name] for name in wanted]

    def _borrow(self, part: str, files: Sequence[CheckpointFile]) -> bool:
        """Copy a part from another worker's store, which has the same files."""
        count = self._meter(files)
        with self._store.lock(part):
            return self._store.has(part) or borrow_part(self._neighbours, self._order, self._store, part, count)

    def _bring_all(self, files: Mapping[str, Sequence[CheckpointFile]]) -> None:
        source = self._open_source()
        with self._room(files, source):
            for part, found in files.items():
                with self._store.lock(part):
                    if not self._store.has(part):
                        self._bring(part, found, source)

    def _bring(self, part: str, files: Sequence[CheckpointFile], source: CheckpointSource) -> None:
        with closing(source.hold([file.name for file in files])):
            weights, manifest = self._downloaded(files, source)
            copy_part(self._store, part, (weights, manifest), _num_bytes(files), self._meter(files))
        if self._order.store.is_source_discarded:
            for file in files:
                source.discard(file.name)

    def _downloaded(self, files: Sequence[CheckpointFile], source: CheckpointSource) -> list[Path]:
        paths = source.bring_files(files, self._on_progress)
        return [paths[file.name] for file in files]

    def _meter(self, files: Sequence[CheckpointFile]) -> Callable[[int], None]:
        done = 0

        def count(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            self._on_progress(LoadProgress("downloading", done, _num_bytes(files)))

        return count

    def _room(
        self, files: Mapping[str, Sequence[CheckpointFile]], source: CheckpointSource | None = None
    ) -> AbstractContextManager[None]:
        """Count what `source` must download besides; of what is discarded, one part is there at a time."""
        missing = [source.missing(found) for found in files.values()] if source else []
        if self._order.store.is_source_discarded:
            missing = sorted(missing, key=lambda found: sum(found.values()))[-1:]
        sizes = {self._store.path(part): _num_bytes(found) for part, found in files.items()}
        return promised_room(self._store.root, sizes, self._order.store, self._measure, dict(ChainMap(*missing)))

    def _refuse_damaged_download(self, part: str) -> None:
        """Raise StorageError for a part that is damaged where it was copied from as well."""
        try:
            verify_part(self._store, part)
        except StorageError as error:
            if self._order.store.is_source_discarded:
                raise
            weights, manifest = self._downloaded(self._files_of(part), self._open_source())
            raise StorageError(
                f"{part} is damaged, and so is the download that it was copied from: delete {weights} and {manifest}, "
                "and load the model again"
            ) from error


def _num_bytes(files: Sequence[CheckpointFile]) -> int:
    return sum(file.size_bytes for file in files)


def remove_damaged(store: BlockStore, part: str) -> None:
    """Remove a part unless it is whole: another process may have made it again."""
    with store.lock(part):
        try:
            verify_part(store, part)
        except StorageError:
            store.remove(part)

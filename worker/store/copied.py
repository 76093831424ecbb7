"""The parts of a checkpoint that comes converted: used where they are, or brought whole from where they are.

Covers folders that `cluster convert --output` made. Nothing in a user's folder is changed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from cluster.errors import ConfigurationError, StorageError
from cluster.hub.layout import is_part_file, part_files
from cluster.load_order import LoadOrder, LoadProgress
from cluster.model_spec import CheckpointFile, FolderSource
from worker.architectures.base import Part
from worker.sharing.holders import Neighbours
from worker.sharing.parts import borrow_part
from worker.store.disk import PARTIAL
from worker.store.folder import BlockStore, describe_source, open_store
from worker.store.key import default_store_folder, store_key
from worker.store.verify import verify_part
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
    ) -> None:
        self._order, self._num_blocks, self._store, self._neighbours = order, num_blocks, store, neighbours
        self._open_source, self._on_progress = open_source, on_progress
        self._is_in_place = _is_used_in_place(order)

    def fill(self, parts: Sequence[Part]) -> None:
        """See Filler."""
        missing = [part.name for part in parts if not self._is_there(part.name)]
        if not missing:
            return
        files = {part: self._files_of(part) for part in missing}
        self._store.describe(describe_source(self._order.source, self._order.precision, self._num_blocks))
        source = self._open_source()
        for part in missing:
            with self._store.lock(part):
                if not self._store.has(part) and not self._borrow(part, files[part]):
                    self._bring(source, files[part])

    def rebuild(self, part: Part, error: StorageError) -> None:
        """See Filler."""
        if self._is_in_place:
            raise StorageError(
                f"{error.message}; that folder holds no checkpoint to make it from: copy {part.name} there again, or "
                "make the folder anew with `cluster convert`"
            ) from error
        remove_damaged(self._store, part.name)
        self.fill([part])

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
        done, total = 0, sum(file.size_bytes for file in files)

        def count(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            self._on_progress(LoadProgress("downloading", done, total))

        return borrow_part(self._neighbours, self._order, self._store, part, count)

    def _bring(self, source: CheckpointSource, files: Sequence[CheckpointFile]) -> None:
        """Bring a part's files, the manifest last: it says that the part is there."""
        paths = source.bring_files(files, self._on_progress)
        for file in files:
            target = self._store.folder / file.name
            partial = target.with_name(target.name + PARTIAL)
            shutil.copyfile(paths[file.name], partial)
            partial.replace(target)
        for file in files:
            source.discard(file.name)


def remove_damaged(store: BlockStore, part: str) -> None:
    """Remove a part unless it is whole: another process may have made it again."""
    with store.lock(part):
        try:
            verify_part(store, part)
        except StorageError:
            store.remove(part)

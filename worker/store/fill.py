"""Brings the parts that a span needs into the block store: those that are missing, from a worker that has them, or made
from the checkpoint, each once among all processes.

Covers which parts are missing, locks, room, fetching only what they need, and discarding downloads once they are
converted. Killed at any moment, it goes on with the rest. `worker.store.convert` converts one part, `worker.weights`
brings its tensors.
"""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from cluster.errors import StorageError
from cluster.load_order import LoadOrder, LoadProgress
from cluster.model_spec import CheckpointFile, FolderSource
from worker.architectures import Architecture
from worker.architectures.base import Part
from worker.blocks import count_weights
from worker.checkpoint_weights import CheckpointWeights, needed_names
from worker.free_space import FreeBytes, free_bytes
from worker.sharing.holders import Neighbours
from worker.sharing.parts import borrow_part
from worker.store.convert import convert_part
from worker.store.copied import remove_damaged
from worker.store.fill_meter import FillMeter
from worker.store.folder import BlockStore, describe_source
from worker.store.key import EMBEDDING
from worker.store.room import promised_room
from worker.weights import CheckpointSource, needed_files

logger = logging.getLogger(__name__)

_EMBEDDING_ITEM_BYTES = 4  # of the table, at most
_EDITED = (
    "%s is newer than %s, which is used as it was converted: if the weights were edited, remove what was made of the "
    "old ones with `%s` and start again"
)


class StoreFiller:
    """Fills the store of one checkpoint in one precision. `fill` may be called again, for instance after damage."""

    def __init__(
        self,
        order: LoadOrder,
        architecture: Architecture,
        store: BlockStore,
        open_source: Callable[[], CheckpointSource],
        on_progress: Callable[[LoadProgress], None],
        measure: FreeBytes = free_bytes,
        neighbours: Neighbours | None = None,
    ) -> None:
        """`open_source` is called only when a part is missing that no neighbour has, or downloads are discarded."""
        self._neighbours = neighbours or Neighbours.none()
        self._order, self._architecture, self._store = order, architecture, store
        self._open_source, self._on_progress, self._measure = open_source, on_progress, measure

    def fill(self, parts: Sequence[Part], num_at_once: int = 1) -> None:
        """Make the missing ones of `parts`. Raises ConfigurationError and what downloading does; what was made stays.

        With `num_at_once` above 1 some are converted while another is downloaded, in threads.
        """
        missing = [part for part in parts if not self._store.has(part.name)]
        self._tell_edited_source([part for part in parts if part not in missing])
        if missing:
            self._fill_missing(missing, num_at_once)
        if self._order.store.is_source_discarded:
            self._discard_source(parts)

    def _fill_missing(self, missing: Sequence[Part], num_at_once: int) -> None:
        described = describe_source(self._order.source, self._order.precision, self._architecture.num_blocks)
        with self._room(missing):
            self._store.describe(described)
            meter = FillMeter({part.name: self._estimate(part) for part in missing}, self._on_progress)
            missing = [part for part in missing if not self._borrow(part.name, meter)]
            if missing:
                self._make_all(missing, meter, num_at_once)

    def _tell_edited_source(self, present: Sequence[Part]) -> None:
        """Warn where a folder's file is newer than a part: few edited bytes do not make it another checkpoint."""
        if not isinstance(self._order.source, FolderSource):
            return
        for part in present:
            manifest = self._store.manifest_path(part.name)
            for file in self._files_of(part):
                path = Path(self._order.source.path, file.name)
                if _modified(path) > _modified(manifest):
                    prune = shlex.join(
                        ["cluster", "store", "prune", "--store-dir", str(self._store.root), self._store.key]
                    )
                    logger.warning(_EDITED, path, manifest, prune)
                    return

    def _discard_source(self, parts: Sequence[Part]) -> None:
        """Discard also what earlier runs downloaded for parts that are there."""
        source = self._open_source()
        for file in _union(map(self._files_of, parts)):
            source.discard(file.name)

    def _borrow(self, part: str, meter: FillMeter) -> bool:
        """Copy a part from a worker that has it, unless another process of this machine makes it now."""
        lock = self._store.try_lock(part)
        if lock is None:
            return False
        try:
            count = meter.converting(part)
            is_here = self._store.has(part) or borrow_part(self._neighbours, self._order, self._store, part, count)
        finally:
            os.close(lock)
        if is_here:
            meter.finish(part)
        return is_here

    def _make_all(self, missing: Sequence[Part], meter: FillMeter, num_at_once: int) -> None:
        source = self._open_source()
        needs = {part.name: self._files_of(part) for part in missing}
        is_discarding = self._order.store.is_source_discarded
        at_once = _held_at_once(list(needs.values()), num_at_once) if is_discarding else [_union(needs.values())]
        wanted = max(map(source.missing, at_once), key=lambda files: sum(files.values()))
        with self._room(missing, wanted), _Downloads(source, needs, is_discarding=is_discarding) as downloads:
            self._run(missing, downloads, meter, num_at_once)

    def rebuild(self, part: Part, error: StorageError) -> None:  # noqa: ARG002 - what Filler says
        """See Filler."""
        remove_damaged(self._store, part.name)
        self.fill([part])

    def _run(self, missing: Sequence[Part], downloads: _Downloads, meter: FillMeter, num_at_once: int) -> None:
        if num_at_once > 1:
            with ThreadPoolExecutor(num_at_once, thread_name_prefix="convert") as pool:
                try:
                    list(pool.map(lambda part: self._make(part, downloads, meter, is_patient=False), missing))
                except BaseException:
                    meter.stop()
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        else:
            for part in missing:
                self._make(part, downloads, meter, is_patient=False)
        for part in missing:  # those that another process was making
            self._make(part, downloads, meter, is_patient=True)

    def _make(self, part: Part, downloads: _Downloads, meter: FillMeter, *, is_patient: bool) -> None:
        """Make a part, unless another process does: then wait for it if `is_patient`, else leave it."""
        with ExitStack() as stack:
            if is_patient:
                stack.enter_context(self._store.lock(part.name, meter.report))
            elif (lock := self._store.try_lock(part.name)) is not None:
                stack.callback(os.close, lock)
            else:
                return
            if not self._store.has(part.name):
                self._convert(part, downloads, meter)
        meter.finish(part.name)
        downloads.finish(part.name)

    def _convert(self, part: Part, downloads: _Downloads, meter: FillMeter) -> None:
        needed = needed_names(self._architecture, [part])
        with meter.downloading() as on_progress:
            checkpoint = downloads.source.fetch(needed.__contains__, on_progress)
        with checkpoint:
            weights = CheckpointWeights(self._order, self._architecture, checkpoint)
            convert_part(part, weights, self._store, self._order.precision, meter.converting(part.name))

    def _files_of(self, part: Part) -> list[CheckpointFile]:
        return needed_files(self._order, needed_names(self._architecture, [part]).__contains__)

    def _estimate(self, part: Part) -> int:
        """Return about how many bytes a part takes in the store."""
        table = self._architecture.vocab_size * self._architecture.hidden_size if part.name == EMBEDDING else 0
        count = count_weights(part.module, part.use.unquantized)
        return count.resident_bytes(self._order.precision) + _EMBEDDING_ITEM_BYTES * table

    def _room(
        self, missing: Sequence[Part], downloads: Mapping[Path, int] | None = None
    ) -> AbstractContextManager[None]:
        sizes = {self._store.path(part.name): self._estimate(part) for part in missing}
        return promised_room(self._store.root, sizes, self._order.store, self._measure, downloads)


class _Downloads:
    """The files that missing parts need: held until all of those parts are made, then discarded if asked."""

    def __init__(
        self, source: CheckpointSource, needs: Mapping[str, Sequence[CheckpointFile]], *, is_discarding: bool
    ) -> None:
        self.source, self._is_discarding = source, is_discarding
        self._needed_by = {
            file.name: {part for part, files in needs.items() if file in files} for file in _union(needs.values())
        }
        self._held = source.hold(self._needed_by)

    def __enter__(self) -> _Downloads:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def finish(self, part: str) -> None:
        """Note that a part is made. Idempotent."""
        for name, parts in self._needed_by.items():
            if part in parts:
                parts.remove(part)
                if not parts:
                    self._release(name)

    def _release(self, name: str) -> None:
        self._held.release(name)
        if self._is_discarding:
            self.source.discard(name)


def _union(files: Iterable[Sequence[CheckpointFile]]) -> list[CheckpointFile]:
    return sorted({file for some in files for file in some}, key=lambda file: file.name)


def _held_at_once(needs: Sequence[Sequence[CheckpointFile]], num_at_once: int) -> list[list[CheckpointFile]]:
    """Return the files that are here while each part is made, where each goes with the last part that needs it."""
    last = {file: index for index, files in enumerate(needs) for file in files}
    first = {file: index for index, files in reversed(list(enumerate(needs))) for file in files}
    return [
        [file for file in last if first[file] < index + num_at_once and index <= last[file]]
        for index in range(len(needs))
    ]


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0  # of a folder that only another machine has

"""A span's weights from the block store, converted first where they are missing.

Covers which store an order means, reading parts, and making a damaged one again; `worker.store.fill` converts,
`worker.stream` reads what is not held in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor

from cluster.errors import ConfigurationError, StorageError
from cluster.load_order import LoadOrder, LoadProgress
from worker.architectures import Architecture
from worker.architectures.base import Part
from worker.blocks import LinearLayer
from worker.sharing.holders import Neighbours
from worker.store.convert import TABLE
from worker.store.copied import CopiedStore, Filler, is_converted, store_of
from worker.store.fill import StoreFiller
from worker.store.key import EMBEDDING
from worker.store.manifest import WeightPlace
from worker.store.reader import PartFile
from worker.store.verify import verify_part
from worker.stored_weight import StoredWeight
from worker.stream.device_source import Copier
from worker.stream.opening import OpenSpan
from worker.weights import CheckpointSource

logger = logging.getLogger(__name__)

BringWeight = Callable[[PartFile, WeightPlace], StoredWeight]
"""Returns a weight of an open part, in memory or streamed."""


def uses_store(order: LoadOrder) -> bool:
    """Tell whether an order's weights come from the block store. Others that fit into memory are read from the
    checkpoint itself, so that the disk need not hold them twice."""
    return order.precision.is_quantized or uses_disk(order) or is_converted(order)


def uses_disk(order: LoadOrder) -> bool:
    """Tell whether some weights are read while the stage computes."""
    return order.num_streamed > 0 or order.expert_cache_bytes > 0


class StoreWeights:
    """The parts of one span. Close it when they are loaded; `table` stays usable."""

    def __init__(
        self,
        order: LoadOrder,
        architecture: Architecture,
        open_source: Callable[[], CheckpointSource],
        on_progress: Callable[[LoadProgress], None],
        neighbours: Neighbours,
        copier: Copier | None = None,
    ) -> None:
        """`open_source` is called only when something is missing that no neighbour has; `copier` as in OpenSpan."""
        self._on_progress, self._copier = on_progress, copier
        self.store = store_of(order)
        self._hold = self.store.hold_folder()
        self._filler: Filler = (
            CopiedStore(order, architecture.num_blocks, self.store, open_source, self._report, neighbours)
            if is_converted(order)
            else StoreFiller(order, architecture, self.store, open_source, self._report, neighbours=neighbours)
        )
        self._open: list[PartFile] = []
        self._is_loading = True
        self.streams: OpenSpan | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._is_loading = False
        for file in self._open:
            file.close()
        self._hold.close()
        if any(error) and self.streams is not None:
            self.streams.close()

    def stream(self, order: LoadOrder, parts: Sequence[Part]) -> None:
        """Let what the order says come from disk while the stage computes. `streams` outlives this."""
        names = [part.name for part in parts if part.name != EMBEDDING]
        self.streams = OpenSpan(order, names, lambda name: PartFile(self.store, name), copier=self._copier)

    def fill(self, parts: Sequence[Part]) -> None:
        """Make what is missing, or no longer whole by its size. Raises SpanwiseError, and what downloading does."""
        written = self.store.parts()
        for part in parts:
            if part.name in written:
                self._make_sure_it_opens(part)
        self._filler.fill(parts)

    def part(self, part: Part) -> StoredPart:
        """Return a part's tensors. Raises StorageError when it is damaged."""
        file = PartFile(self.store, part.name)
        self._open.append(file)
        if self.streams is None:
            return StoredPart(file, PartFile.open_weight)
        return streamed_part(self.streams, file, is_streamed=self.streams.is_streamed(part.name))

    def table(self) -> StoredTable:
        """Return the embedding's rows, compared with their checksums now. Raises StorageError."""
        size, done = self.store.manifest(EMBEDDING).file_bytes, 0

        def count(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            self._on_progress(LoadProgress("verifying", done, size))

        verify_part(self.store, EMBEDDING, count)
        return StoredTable(PartFile(self.store, EMBEDDING))

    def rebuild(self, part: Part, error: StorageError) -> None:
        """Make a damaged part again, also when all is loaded. Raises StorageError where that is not possible."""
        logger.warning("making a damaged part of the block store again: %s", error.message)
        try:
            self._filler.rebuild(part, error)
        except ConfigurationError as cause:
            raise StorageError(f"{error.message}. It cannot be made again: {cause.message}") from cause

    def _make_sure_it_opens(self, part: Part) -> None:
        try:
            PartFile(self.store, part.name).close()
        except StorageError as error:
            self.rebuild(part, error)

    def _report(self, progress: LoadProgress) -> None:
        if self._is_loading:  # nobody listens any more when a part is made again later
            self._on_progress(progress)


@dataclass(frozen=True, slots=True)
class StoredPart:
    """The PartTensors of one part."""

    file: PartFile
    bring: BringWeight

    def weight(self, layer: LinearLayer) -> StoredWeight:
        """See PartTensors."""
        place = self.file.manifest.weight(layer.name)
        if place.shape != layer.shape:
            raise self._of_another_model(layer.name, place.shape, layer.shape)
        return self.bring(self.file, place)

    def tensor(self, name: str, shape: torch.Size) -> Tensor:
        """See PartTensors."""
        place = self.file.manifest.small.get(name)
        if place is None or place.shape != tuple(shape):
            raise self._of_another_model(name, place.shape if place else (), shape)
        return self.file.read_tensor(name, place)

    def _of_another_model(self, name: str, found: Sequence[int], expected: Sequence[int]) -> ConfigurationError:
        return ConfigurationError(
            f"{self.file.path} holds {name} as {list(found)}, but config.json implies {list(expected)}: they belong to "
            "different models"
        )


def streamed_part(streams: OpenSpan, file: PartFile, *, is_streamed: bool) -> StoredPart:
    """Return the tensors of a part some of which may come from disk while the stage computes."""
    return StoredPart(file, partial(streams.bring, is_streamed=is_streamed))


class StoredTable:
    """The embedding, on the disk: only rows that are looked up are read."""

    def __init__(self, file: PartFile) -> None:
        self._file, self._place = file, file.manifest.weight(TABLE)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Return the rows of token ids `[num_tokens]` as `[num_tokens, hidden_size]`, in the checkpoint's dtype."""
        return self._file.read_rows(self._place, rows.tolist())

    def __del__(self) -> None:
        """Close the file with the last reference, as a memory-mapped tensor does."""
        self._file.close()

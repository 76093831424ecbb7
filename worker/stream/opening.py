"""From an order and the parts of its span to readers, ring and experts' cache, and to weights that come through them.

Covers wiring; `worker.loading` builds modules over the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from torch import nn

from cluster.errors import StorageError
from cluster.load_order import LoadOrder
from worker.store.manifest import WeightPlace
from worker.store.reader import PartFile
from worker.stored_weight import StoredWeight
from worker.stream.device_source import Copier, DeviceSource, HostSource
from worker.stream.disk_weights import DiskWeights
from worker.stream.experts import ExpertCache
from worker.stream.probe import ProbeResult, probe
from worker.stream.readers import Readers
from worker.stream.residency import Residency, ShiftingPart, parts_in_order
from worker.stream.ring import ReadCounters, SliceRing
from worker.stream.streamed_file import Extent, StreamedFile, expert_extents, slice_extents
from worker.stream.streamed_weight import StreamedWeight


class OpenSpan:
    """The blocks of one span, and the head of the last stage, as they come from disk.

    Holds them open, so that their files are not pruned, until it is closed or what it made is.
    """

    def __init__(
        self,
        order: LoadOrder,
        parts: Sequence[str],
        open_part: Callable[[str], PartFile],
        measure: Callable[[Sequence[Path]], ProbeResult] = probe,
        copier: Copier | None = None,
    ) -> None:
        """`parts` are the blocks in order, then perhaps the head. Measures the disk. `copier` brings what was read to
        the device, where that has memory of its own.

        Raises ConfigurationError for a ring or a cache too small, StorageError for a part that is not there.
        """
        self._order, self._open_part, self._copier = order, open_part, copier
        self._on_device: list[DeviceSource] = []
        self._files: dict[str, PartFile] = {}
        self._streamed: dict[str, StreamedFile] = {}
        try:
            self._open(parts, measure)
        except BaseException:
            self.close()
            raise

    def _open(self, parts: Sequence[str], measure: Callable[[Sequence[Path]], ProbeResult]) -> None:
        for name in parts:
            self._files[name] = self._open_part(name)
        self._probed = measure([file.path for file in self._files.values()])
        plan = self._probed.plan
        for name, file in self._files.items():
            self._streamed[name] = StreamedFile(name, file.path, is_direct=plan.is_direct)
        self._slices = {name: slice_extents(file.manifest, self._streamed[name]) for name, file in self._files.items()}
        self._experts = {
            name: expert_extents(file.manifest, self._streamed[name]) for name, file in self._files.items()
        }
        self._counters = ReadCounters()
        self._readers = Readers(plan, name=f"stage-{self._order.stage}")
        self._ring = self._make_ring() if self._order.num_streamed else None
        self._cache = self._make_cache() if self._order.expert_cache_bytes else None
        self._device_ring = self._make_device_source(self._ring, self._counters)
        self._device_cache = self._make_device_source(self._cache, ReadCounters())  # the cache counts what it reads

    @property
    def bytes_per_second(self) -> float:
        """What the probe gave."""
        return self._probed.bytes_per_second

    def open_part(self, part: str) -> PartFile:
        """Open a part once more: it may have been made again."""
        return self._open_part(part)

    def is_streamed(self, part: str) -> bool:
        """Tell whether a part is streamed at first; parts of another kind never are."""
        first = parts_in_order(len(self._order.span), len(self._files))[: self._order.num_streamed]
        return part in {tuple(self._files)[index] for index in first}

    def bring(self, file: PartFile, place: WeightPlace, *, is_streamed: bool) -> StoredWeight:
        """Return a weight of a part that is streamed, or resident with its experts perhaps read on demand."""
        part = file.manifest.part
        if part not in self._files:
            return file.open_weight(place)
        expert = file.manifest.slices[place.pieces[0].slice_index].expert
        if is_streamed and self._ring is not None:
            source = self._device_ring or self._ring
            return StreamedWeight(place, file.read_weight_small(place), self._slices[part], source)
        if self._cache is not None and expert is not None:
            extents = (self._experts[part][expert],) * len(file.manifest.slices)
            return StreamedWeight(place, file.read_weight_small(place), extents, self._device_cache or self._cache)
        return file.open_weight(place)

    def expert_arrivals(self, part: str) -> Callable[[Sequence[int]], Iterable[int]]:
        """Return what a block's SparseExperts asks for experts."""
        return partial(self._cache.arrivals, self._experts[part]) if self._cache is not None else iter

    def disk_weights(
        self, build: Callable[[str, bool], nn.Module], make_again: Callable[[str, StorageError], None]
    ) -> DiskWeights:
        """Return what the stage owns; reading ahead begins.

        `build(part, is_streamed)` builds a part anew: a block, or the head's linear layer. `make_again(part, error)`
        makes a damaged part of the store again, or raises why it cannot.
        """
        for source in self._on_device:
            source.pin()
        residency = None
        if self._ring is not None:
            parts = [
                ShiftingPart(file.manifest.streamed_bytes, self._slices[name], partial(build, name))
                for name, file in self._files.items()
            ]
            order = self._order
            budget = order.memory_bytes if self._copier is None else 0  # a GPU's pages have all their memory at once
            residency = Residency(parts, len(order.span), order.num_streamed, budget, self._ring)
            residency.start()
        repair = partial(self._repair, make_again)
        ring = self._device_ring or self._ring
        cache, expert_bytes = self._cache, sum(extent.num_bytes for extent in self._expert_extents())
        return DiskWeights(self._readers, self._counters, self.close, repair, ring, residency, cache, expert_bytes)

    def close(self) -> None:
        """Close the files, and end copying."""
        for source in self._on_device:
            source.close()
        for streamed in self._streamed.values():
            streamed.close()
        for file in self._files.values():
            file.close()

    def _repair(self, make_again: Callable[[str, StorageError], None], error: StorageError) -> None:
        failed = [file for file in self._streamed.values() if file.has_failed]
        if not failed:
            raise error
        for file in failed:
            make_again(file.part, error)
            file.made_again()

    def _make_device_source(self, host: HostSource | None, counters: ReadCounters) -> DeviceSource | None:
        if host is None or self._copier is None:
            return None
        self._on_device.append(DeviceSource(host, self._copier, counters))
        return self._on_device[-1]

    def _make_ring(self) -> SliceRing:
        slot_bytes = _largest(extent for extents in self._slices.values() for extent in extents)
        return SliceRing(self._readers, self._counters, ring_bytes=self._order.ring_bytes, slot_bytes=slot_bytes)

    def _make_cache(self) -> ExpertCache:
        slot_bytes = _largest(self._expert_extents())
        return ExpertCache(
            self._readers, self._counters, cache_bytes=self._order.expert_cache_bytes, slot_bytes=slot_bytes
        )

    def _expert_extents(self) -> list[Extent]:
        """Return all experts, where they are read on demand."""
        if not self._order.expert_cache_bytes:
            return []
        return [extent for experts in self._experts.values() for extent in experts.values()]


def _largest(extents: Iterable[Extent]) -> int:
    return max(extent.num_bytes for extent in extents)

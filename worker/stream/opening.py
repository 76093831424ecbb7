"""From an order and the parts of its span to readers, ring and experts' cache, and to weights that come through them.

Covers wiring; `worker.loading` builds modules over what `bring_streamed` and `bring_resident` return.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from torch import nn

from cluster.load_order import LoadOrder
from worker.store.manifest import PartManifest, WeightPlace
from worker.store.reader import PartFile
from worker.stored_weight import StoredWeight
from worker.stream.disk_weights import DiskWeights
from worker.stream.experts import ExpertCache
from worker.stream.probe import ProbeResult
from worker.stream.readers import Readers
from worker.stream.residency import Residency, ShiftingPart
from worker.stream.ring import ReadCounters, SliceRing
from worker.stream.streamed_file import Extent, StreamedFile, expert_extents, slice_extents
from worker.stream.streamed_weight import StreamedWeight


class OpenSpan:
    """The blocks of one span, and the head of the last stage, as they come from disk."""

    def __init__(self, order: LoadOrder, files: Sequence[PartFile], probed: ProbeResult) -> None:
        """`files` are open only for what is read now. Raises ConfigurationError for a ring or a cache too small."""
        self._order, self._files = order, tuple(files)
        self._counters = ReadCounters()
        self._readers = Readers(probed.plan, name=f"stage-{order.stage}")
        self._streamed = {
            file.manifest.part: StreamedFile(file.manifest.part, file.path, is_direct=probed.plan.is_direct)
            for file in files
        }
        self._slices = {name: slice_extents(self._manifest(name), file) for name, file in self._streamed.items()}
        self._experts = {name: expert_extents(self._manifest(name), file) for name, file in self._streamed.items()}
        self._ring = self._make_ring() if order.num_streamed else None
        self._cache = self._make_cache() if order.expert_cache_bytes else None

    def bring_streamed(self, file: PartFile, place: WeightPlace) -> StoredWeight:
        """Return a weight that passes through the ring."""
        assert self._ring is not None
        small = file.read_weight_small(place)
        return StreamedWeight(place, small, self._slices[file.manifest.part], self._ring)

    def bring_resident(self, file: PartFile, place: WeightPlace) -> StoredWeight:
        """Return a weight in memory, or one that passes through the experts' cache if there is one."""
        expert = file.manifest.slices[place.pieces[0].slice_index].expert
        if self._cache is None or expert is None:
            return file.read_weight(place)
        extent = self._experts[file.manifest.part][expert]
        extents = (extent,) * len(file.manifest.slices)
        return StreamedWeight(place, file.read_weight_small(place), extents, self._cache)

    def expert_arrivals(self, part: str) -> Callable[[Sequence[int]], Iterable[int]]:
        """Return what a block's SparseExperts asks for experts."""
        return partial(self._cache.arrivals, self._experts[part]) if self._cache is not None else iter

    def disk_weights(self, builds: Sequence[Callable[[bool], nn.Module]]) -> DiskWeights:
        """Return what the stage owns. `builds[i]` builds part i, streamed or not: a block, or the head's linear layer.

        Reading ahead begins.
        """
        residency = None
        if self._ring is not None:
            parts = [
                ShiftingPart(file.manifest.streamed_bytes, self._slices[file.manifest.part], build)
                for file, build in zip(self._files, builds, strict=True)
            ]
            order = self._order
            residency = Residency(parts, len(order.span), order.num_streamed, order.memory_bytes, self._ring)
            residency.start()
        files = tuple(self._streamed.values())
        return DiskWeights(self._readers, self._counters, files, self._ring, residency, self._cache)

    def _manifest(self, part: str) -> PartManifest:
        return next(file.manifest for file in self._files if file.manifest.part == part)

    def _make_ring(self) -> SliceRing:
        slot_bytes = _largest(extent for extents in self._slices.values() for extent in extents)
        return SliceRing(self._readers, self._counters, ring_bytes=self._order.ring_bytes, slot_bytes=slot_bytes)

    def _make_cache(self) -> ExpertCache:
        slot_bytes = _largest(extent for experts in self._experts.values() for extent in experts.values())
        return ExpertCache(
            self._readers, self._counters, cache_bytes=self._order.expert_cache_bytes, slot_bytes=slot_bytes
        )


def _largest(extents: Iterable[Extent]) -> int:
    return max(extent.num_bytes for extent in extents)

"""What a stage owns of weights on disk: readers, the ring with its residency, the experts' cache, and their counters.

Covers opening and closing them together and a step's account; `worker.loading` builds the modules over them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from cluster.errors import StorageError
from cluster.microbatch import WeightTraffic
from worker.kv_cache import KVCache
from worker.stream.device_source import DeviceSource
from worker.stream.experts import ExpertCache
from worker.stream.readers import Readers
from worker.stream.residency import Residency
from worker.stream.ring import ReadCounters, SliceRing


@dataclass(slots=True)
class DiskWeights:
    """Owned by one stage. All methods are the compute thread's."""

    readers: Readers
    counters: ReadCounters
    close_files: Callable[[], None]
    repair: Callable[[StorageError], None]  # makes what could not be read again, or raises why that is not possible
    slices: SliceRing | DeviceSource | None = None  # the ring, or what a GPU has of it
    residency: Residency | None = None  # with a ring
    experts: ExpertCache | None = None
    expert_bytes: int = 0  # of the experts that are read on demand

    @property
    def streamed_bytes(self) -> int:
        """Bytes that a pass reads through the ring now; of experts, all that it may read."""
        return self.residency.streamed_bytes if self.residency is not None else self.expert_bytes

    @property
    def shifting_bytes(self) -> int:
        """Bytes of the resident weights that may yet be streamed."""
        return self.residency.weight_bytes if self.residency is not None else 0

    def begin_pass(self, cache: KVCache, place: Callable[[int, nn.Module], None]) -> None:
        """Shift parts between memory and disk as the pages in use demand, see Residency."""
        if self.residency is not None:
            self.residency.make_room(cache, place)
        self.counters.read_bytes = self.counters.stall_ns = 0

    def end_pass(self, resident_bytes: int) -> WeightTraffic:
        """Account for the pass, and let the readers run ahead into the next one.

        `resident_bytes` are those of weights that always stay in memory.
        """
        if self.slices is not None:
            self.slices.release()
        cached = self.experts.cached_bytes if self.experts is not None else 0
        resident = resident_bytes + self.shifting_bytes + cached
        return WeightTraffic(self.counters.read_bytes, self.counters.stall_ns, resident)

    def close(self) -> None:
        """End the threads and close the files."""
        self.readers.close()
        self.close_files()

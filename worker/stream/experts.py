"""Experts that are read when a router chooses them, and kept while they are chosen often.

Covers which experts are in memory; routing and arithmetic are `worker.architectures.mixtral`'s.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from cluster.errors import ConfigurationError
from worker.stream.readers import Fill, Readers, make_slots
from worker.stream.ring import ReadCounters
from worker.stream.streamed_file import Extent

MIN_SLOTS = 2  # one computed with, one being read
AGEING_CHOICES = 16  # choices per slot after which all counts are halved


class ExpertCache:
    """Slots of one expert each, shared by all blocks of a span. All methods are the compute thread's.

    An expert that must be read takes the place of the one chosen least often lately (LFU with ageing): a cyclic scan
    over blocks, as passes make it, would find nothing in a cache that forgets the least recently used.
    """

    def __init__(
        self,
        readers: Readers,
        counters: ReadCounters,
        *,
        cache_bytes: int,
        slot_bytes: int,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`slot_bytes` is the largest expert. Raises ConfigurationError for a cache of fewer than two."""
        if cache_bytes < MIN_SLOTS * slot_bytes:
            raise ConfigurationError(
                f"the cache of experts has {cache_bytes:,} bytes, but needs {MIN_SLOTS * slot_bytes:,}: "
                f"{MIN_SLOTS} experts of this model"
            )
        self._readers, self._counters, self._clock_ns = readers, counters, clock_ns
        self.slots = tuple(make_slots(cache_bytes // slot_bytes, slot_bytes))
        self._free = list(self.slots)
        self._yielded: Extent | None = None  # and not fetched yet
        self._max_choices = AGEING_CHOICES * len(self._free)
        self._num_choices = 0
        self._uses: dict[Extent, float] = {}
        self._fills: dict[Extent, Fill] = {}  # cached or on their way

    @property
    def cached_bytes(self) -> int:
        """Bytes of the experts in memory."""
        return sum(extent.num_bytes for extent in self._fills)

    def arrivals(self, experts: Mapping[int, Extent], chosen: Sequence[int]) -> Iterator[int]:
        """Yield the `chosen` experts of a block, those in memory first, the others as they arrive.

        All are asked for at once, as far as there are slots. One is valid until the next is yielded.
        Raises StorageError, StageTimeoutError; the next call reads anew.
        """
        self._forget_failed()
        self._count(experts[number] for number in chosen)
        waiting = sorted(chosen, key=lambda number: experts[number] not in self._fills)
        wanted = deque(experts[number] for number in waiting)  # not asked for yet
        pinned = set(wanted)
        for number in waiting:
            self._ask(wanted, pinned)
            while experts[number] in wanted:  # slots are still written for a step that failed
                self._readers.wait([fill for extent, fill in self._fills.items() if extent not in pinned])
                self._ask(wanted, pinned)
            self._await(experts[number])
            self._yielded = experts[number]
            yield number
            pinned.discard(experts[number])

    def take(self, extent: Extent) -> Tensor:
        """Return the bytes of the expert that `arrivals` yielded last."""
        return self._fills[extent].slot.tensor

    def fetch(self, extent: Extent) -> Tensor:
        """As `take`, for whoever copies the bytes elsewhere."""
        self._yielded = None
        return self.take(extent)

    def arrived(self) -> Extent | None:
        """Return the expert that `arrivals` yielded last, until it is fetched."""
        return self._yielded

    def release(self) -> None:
        """Do nothing: what was fetched is let go of when `arrivals` goes on."""

    def _count(self, extents: Iterator[Extent]) -> None:
        for extent in extents:
            self._uses[extent] = self._uses.get(extent, 0.0) + 1
            self._num_choices += 1
        if self._num_choices >= self._max_choices:
            self._num_choices = 0
            self._uses = {extent: uses / 2 for extent, uses in self._uses.items()}

    def _ask(self, wanted: deque[Extent], pinned: set[Extent]) -> None:
        """Begin to read experts that are not in memory, while there are slots for them."""
        while wanted:
            if wanted[0] not in self._fills:
                if not self._free and not self._evict(pinned):
                    return
                self._fills[wanted[0]] = self._readers.start(wanted[0], self._free.pop())
                self._counters.read_bytes += wanted[0].num_bytes
            wanted.popleft()

    def _evict(self, pinned: set[Extent]) -> bool:
        settled = [extent for extent, fill in self._fills.items() if fill.is_settled and extent not in pinned]
        if not settled:
            return False
        victim = min(settled, key=lambda extent: self._uses.get(extent, 0.0))
        self._free.append(self._fills.pop(victim).slot)
        return True

    def _await(self, extent: Extent) -> None:
        fill = self._fills[extent]
        started = self._clock_ns()
        try:
            self._readers.wait((fill,))
        finally:
            self._counters.stall_ns += self._clock_ns() - started
        if fill.error is not None:
            extent.file.suspect()  # once more: reads under way may have opened it since
            self._forget_failed()
            raise fill.error

    def _forget_failed(self) -> None:
        for extent in [extent for extent, fill in self._fills.items() if fill.is_settled and fill.error is not None]:
            self._free.append(self._fills.pop(extent).slot)

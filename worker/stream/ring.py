"""The ring: reused slots through which the streamed slices of a span pass, in the order in which blocks use them.

Readers run ahead of the computation as far as there are slots, around the end of the span into the next pass, also
while no step is computed. Covers that order; reading is `worker.stream.readers`', and which parts are streamed
`worker.stream.residency`'s.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from cluster.errors import ConfigurationError, InvariantError, SpanwiseError
from worker.stream.readers import Fill, Readers, make_slots
from worker.stream.streamed_file import Extent

MIN_SLOTS = 3  # one computed with, one being read, one between them


@dataclass(slots=True)
class ReadCounters:
    """What the compute thread used so far of what was read, and how long it waited for it."""

    read_bytes: int = 0
    stall_ns: int = 0


class SliceRing:
    """Hands out extents in a fixed cyclic order. All methods are the compute thread's."""

    def __init__(
        self,
        readers: Readers,
        counters: ReadCounters,
        *,
        ring_bytes: int,
        slot_bytes: int,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`slot_bytes` is the largest extent that will ever pass. Raises ConfigurationError for too small a ring."""
        if ring_bytes < MIN_SLOTS * slot_bytes:
            raise ConfigurationError(
                f"the buffers for streamed weights have {ring_bytes:,} bytes, but need {MIN_SLOTS * slot_bytes:,}: "
                f"{MIN_SLOTS} slices of this model"
            )
        self._readers, self._counters, self._clock_ns = readers, counters, clock_ns
        self.slots = tuple(make_slots(ring_bytes // slot_bytes, slot_bytes))
        self._free = list(self.slots)
        self._order: tuple[Extent, ...] = ()
        self._places: dict[Extent, int] = {}
        self._next = 0  # in the order: what is read next
        self._ahead: deque[Fill] = deque()  # in order, what is or will be in memory
        self._dropped: list[Fill] = []  # unwanted, while their slots are still being written
        self._taken: Fill | None = None

    def set_order(self, extents: Sequence[Extent]) -> None:
        """Replace what passes through the ring, each extent once per pass, and read ahead."""
        self.drain()
        self._order = tuple(extents)
        self._places = {extent: place for place, extent in enumerate(self._order)}
        self._next = 0
        self._read_ahead()

    def take(self, extent: Extent) -> Tensor:
        """Return the bytes of `extent`, uint8, once they are there; they are valid until another one is taken.

        An extent that is not the next one is found as well, at the cost of what was read ahead. Raises StorageError
        for bytes that are not there or not as written, StageTimeoutError when the disk hangs; the next call reads anew.
        """
        if self._taken is not None and self._taken.extent is extent:
            return self._taken.slot.tensor
        memory = self.fetch(extent)
        self._counters.read_bytes += extent.num_bytes
        return memory

    def fetch(self, extent: Extent) -> Tensor:
        """As `take`, for whoever copies the bytes elsewhere, and counts what of that is used."""
        self.release()
        self._move_to(extent)
        self._taken = self._await_next()
        return self._taken.slot.tensor

    def arrived(self) -> Extent | None:
        """Return the extent that comes next, if it is there."""
        if self._ahead and self._ahead[0].is_settled and self._ahead[0].error is None:
            return self._ahead[0].extent
        return None

    def release(self) -> None:
        """Let go of what was taken; its slot is read into again."""
        if self._taken is not None:
            self._free.append(self._taken.slot)
            self._taken = None
            self._read_ahead()

    def drain(self) -> None:
        """Forget what was read and read nothing more until an extent is taken."""
        if self._taken is not None:
            self._free.append(self._taken.slot)
            self._taken = None
        while self._ahead:
            self._drop_first()

    def _move_to(self, extent: Extent) -> None:
        """Make `extent` the first of those ahead. One that failed while nobody waited is read anew."""
        while self._ahead and (self._ahead[0].extent is not extent or self._ahead[0].error is not None):
            self._drop_first()
        if not self._ahead:
            self._next = self._place_of(extent)
        self._read_ahead()

    def _place_of(self, extent: Extent) -> int:
        place = self._places.get(extent)
        if place is None:
            raise InvariantError(f"{extent.file.part} is resident but was taken from the ring: please report")
        return place

    def _await_next(self) -> Fill:
        started = self._clock_ns()
        try:
            while not self._ahead:  # every slot is still written by a read that nobody wants
                self._readers.wait(self._dropped)
                self._read_ahead()
            self._readers.wait((self._ahead[0],))
            if (error := self._ahead[0].error) is not None:
                self._ahead[0].extent.file.suspect()  # once more: reads under way may have opened it since
                raise error
        except SpanwiseError:
            self.drain()
            raise
        finally:
            self._counters.stall_ns += self._clock_ns() - started
        return self._ahead.popleft()

    def _read_ahead(self) -> None:
        settled = [fill for fill in self._dropped if fill.is_settled]
        self._dropped = [fill for fill in self._dropped if fill not in settled]
        self._free.extend(fill.slot for fill in settled)
        while self._free and self._order:
            self._ahead.append(self._readers.start(self._order[self._next], self._free.pop()))
            self._next = (self._next + 1) % len(self._order)

    def _drop_first(self) -> None:
        fill = self._ahead.popleft()
        self._readers.drop(fill)
        self._dropped.append(fill)

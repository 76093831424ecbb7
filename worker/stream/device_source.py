"""Streamed weights on a device with memory of its own: copied there from the host's while the device computes.

Two buffers of one extent each lie on the device: one is computed with while the next extent arrives in the other. Bytes
are copied as they are stored. Three things must never happen, however late the device does what it was told: that a
product reads what has not arrived, that a copy overwrites what a product still reads, and that a reader thread
overwrites what is still being copied.

Covers that order; the copies themselves are `worker.stream.cuda`'s, reading into the host's memory is
`worker.stream.ring`'s and `worker.stream.experts`'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from cluster.load_order import GPU_SLOTS
from worker.stream.readers import Slot, memory_of
from worker.stream.ring import ReadCounters
from worker.stream.streamed_file import Extent


class Event(Protocol):
    """Something that a device was told, and that passes when it is done. `torch.cuda.Event` is one."""

    def synchronize(self) -> None:
        """Return when it has passed."""
        ...

    def wait(self, stream: Any) -> None:
        """Let what `stream` is told from now on begin after it has passed; return at once."""
        ...


class Copier(Protocol):
    """A device that computes and copies at the same time, each in the order in which it was told to, later."""

    def allocate(self, num_bytes: int) -> Tensor:
        """Return memory on the device, uint8, with any content; computations may still have it in use."""
        ...

    def mark(self) -> Event:
        """Return an event that passes when all has been computed that the device was told to compute until now."""
        ...

    def copy(self, source: Tensor, target: Tensor, after: Event) -> Event:
        """Copy from the host's memory, once `after` has passed; return an event that passes when all is copied."""
        ...

    def pin(self, memory: Tensor) -> None:
        """Keep memory of the host where it is, so that it is copied from while the host does something else.

        Raises ConfigurationError where that is not possible.
        """
        ...

    def unpin(self, memory: Tensor) -> None:
        """Undo `pin`."""
        ...


class HostSource(Protocol):
    """What reads extents into slots of the host's memory, made together."""

    @property
    def slots(self) -> Sequence[Slot]: ...

    def fetch(self, extent: Extent) -> Tensor:
        """Return at least the bytes of `extent`, uint8, once they are there; valid until `release`."""
        ...

    def arrived(self) -> Extent | None:
        """Return the extent that will be wanted next, if `fetch` would return it at once."""
        ...

    def release(self) -> None:
        """Let go of what was fetched, if anything was."""
        ...


@dataclass(slots=True)
class _Slot:
    """A reused buffer on the device."""

    memory: Tensor
    used: Event  # passes after the last product with what it held
    copied: Event  # passes when it holds all of `extent`
    extent: Extent | None = None


class DeviceSource:
    """An ExtentSource whose bytes are on a device. All methods are the compute thread's."""

    def __init__(self, host: HostSource, copier: Copier, counters: ReadCounters) -> None:
        """`counters` are told what is taken; it is `host` that counts stalls."""
        self._host, self._copier, self._counters = host, copier, counters
        self._free = [self._make_slot(len(host.slots[0].tensor)) for _ in range(GPU_SLOTS)]
        self._pinned: Tensor | None = None
        self._taken: _Slot | None = None
        self._arriving: _Slot | None = None

    def pin(self) -> None:
        """Pin the host's slots. That commits their memory: what loading took must have been given back."""
        whole = memory_of(self._host.slots)
        self._copier.pin(whole)
        self._pinned = whole

    def take(self, extent: Extent) -> Tensor:
        """See ExtentSource. What is computed with the bytes must have been told to the device before the next call.

        Raises what fetching raises.
        """
        if self._taken is None or self._taken.extent is not extent:
            self._let_go()
            self._taken = self._bring(extent)
            self._counters.read_bytes += extent.num_bytes
            self._copy_ahead()
        return self._taken.memory

    def release(self) -> None:
        """Let go of what was taken and of the host's memory, at the end of a pass; what was copied ahead stays."""
        self._let_go()
        if self._arriving is not None:
            self._settle(self._arriving)

    def close(self) -> None:
        """Wait for what is being copied, before its memory goes, and unpin the host's. Idempotent."""
        if self._arriving is not None:
            self._arriving.copied.synchronize()
        if self._pinned is not None:
            self._copier.unpin(self._pinned)
            self._pinned = None

    def _make_slot(self, num_bytes: int) -> _Slot:
        memory = self._copier.allocate(num_bytes)
        used = self._copier.mark()
        return _Slot(memory, used, copied=used)

    def _let_go(self) -> None:
        if self._taken is not None:
            self._taken.used = self._copier.mark()
            self._free.append(self._taken)
            self._taken = None

    def _bring(self, extent: Extent) -> _Slot:
        """Return a slot that holds `extent`; the host's memory is free again."""
        slot = self._arriving
        if slot is None or slot.extent is not extent:
            self._give_up()
            if self._host.arrived() is not extent:
                self._copier.mark().synchronize()  # until it has nothing to compute, the device does not stall
            slot = self._begin(extent)
        self._settle(slot)
        self._arriving = None
        return slot

    def _copy_ahead(self) -> None:
        extent = self._host.arrived()
        if extent is not None:
            self._begin(extent)

    def _begin(self, extent: Extent) -> _Slot:
        source = self._host.fetch(extent)[: extent.num_bytes]
        slot = self._free.pop()
        slot.extent = extent
        slot.copied = self._copier.copy(source, slot.memory[: extent.num_bytes], slot.used)
        self._arriving = slot
        return slot

    def _give_up(self) -> None:
        """Let go of what was copied ahead but is not wanted next."""
        if self._arriving is not None:
            self._settle(self._arriving)
            self._free.append(self._arriving)
            self._arriving = None

    def _settle(self, slot: _Slot) -> None:
        slot.copied.synchronize()
        self._host.release()

"""Threads that fill memory from extents of files, several reads of one extent at a time, and verify what came.

Covers reading in the order asked for, giving up what is no longer wanted, and noticing a disk that hangs. Which
extents to read is for the ring and the experts' cache.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.errors import StageTimeoutError
from worker.store.manifest import ALIGNMENT
from worker.stream.streamed_file import Extent

HANG_SECONDS = 120.0  # without a byte while somebody waits
CLOSE_SECONDS = 5.0  # that closing waits for reads under way


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """How to read a device, see worker.stream.probe."""

    is_direct: bool
    read_bytes: int  # at a time, a multiple of ALIGNMENT
    num_readers: int


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """Reused page-aligned memory, as Python and as torch see it."""

    memory: memoryview
    tensor: Tensor  # uint8


def make_slots(num_slots: int, slot_bytes: int) -> list[Slot]:
    """Return slots of at least `slot_bytes`. The system commits their memory when it is first written."""
    size = -(-slot_bytes // ALIGNMENT) * ALIGNMENT
    memory = mmap.mmap(-1, num_slots * size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    return [
        Slot(memoryview(memory)[start : start + size], tensor[start : start + size])
        for start in range(0, num_slots * size, size)
    ]


def memory_of(slots: Sequence[Slot]) -> Tensor:
    """Return all memory of slots that were made together, uint8."""
    return torch.empty(0, dtype=torch.uint8).set_(slots[0].tensor.untyped_storage())


class Fill:
    """An extent on its way into a slot. Whoever asked for it reads only `is_settled`, then `error`."""

    __slots__ = ("error", "extent", "is_dropped", "is_settled", "num_left", "slot")

    def __init__(self, extent: Extent, slot: Slot, num_left: int) -> None:
        self.extent, self.slot, self.num_left = extent, slot, num_left
        self.is_dropped = False
        self.is_settled = False  # no thread writes to the slot any more
        self.error: Exception | None = None


class Readers:
    """Reader threads. They start with the first fill and end with `close`."""

    def __init__(self, plan: ReadPlan, *, name: str = "weights", hang_seconds: float = HANG_SECONDS) -> None:
        self._plan, self._name, self._hang_seconds = plan, name, hang_seconds
        lock = threading.Lock()
        self._work, self._progress = threading.Condition(lock), threading.Condition(lock)
        self._jobs: deque[tuple[Fill, int]] = deque()
        self._num_events = 0
        self._is_closed = False
        self._threads: list[threading.Thread] = []

    def start(self, extent: Extent, slot: Slot) -> Fill:
        """Begin to read an extent, after those asked for before. The slot is the fill's until it is settled."""
        starts = range(0, extent.num_bytes, self._plan.read_bytes)
        fill = Fill(extent, slot, len(starts))
        with self._work:
            self._jobs.extend((fill, start) for start in starts)
            self._work.notify(len(starts))
        self._start_threads()
        return fill

    def drop(self, fill: Fill) -> None:
        """Read no more of a fill that nobody wants."""
        with self._work:
            fill.is_dropped = True
            num_jobs = len(self._jobs)
            self._jobs = deque(job for job in self._jobs if job[0] is not fill)
            fill.num_left -= num_jobs - len(self._jobs)
            fill.is_settled = fill.is_settled or fill.num_left == 0

    def wait(self, fills: Sequence[Fill]) -> None:
        """Return when any of `fills` is settled. Raises StageTimeoutError when the disk hangs."""
        with self._progress:
            while not any(fill.is_settled for fill in fills):
                seen = self._num_events
                if not self._progress.wait(self._hang_seconds) and seen == self._num_events:
                    file = fills[0].extent.file
                    raise StageTimeoutError(
                        f"{file.part}: {file.path} gave no byte for {self._hang_seconds:g} s: the disk hangs"
                    )

    def close(self) -> None:
        """End the threads. One that the disk does not let go within CLOSE_SECONDS is left behind."""
        with self._work:
            self._is_closed = True
            self._jobs.clear()
            self._work.notify_all()
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._threads.clear()

    def _start_threads(self) -> None:
        if not self._threads:
            for index in range(self._plan.num_readers + 1):  # while one verifies, as many read as the plan says
                thread = threading.Thread(target=self._run, name=f"read-{self._name}-{index}", daemon=True)
                self._threads.append(thread)
                thread.start()

    # --- in the reader threads ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (job := self._next_job()) is not None:
            fill, start = job
            self._read(fill, start)
            del fill, job  # a waiting thread keeps no memory alive

    def _next_job(self) -> tuple[Fill, int] | None:
        with self._work:
            while not self._jobs and not self._is_closed:
                self._work.wait()
            return None if self._is_closed else self._jobs.popleft()

    def _read(self, fill: Fill, start: int) -> None:
        error: Exception | None = None
        extent = fill.extent
        try:
            extent.read(fill.slot.memory, start, min(start + self._plan.read_bytes, extent.num_bytes))
        except Exception as raised:
            error = raised
        if self._note(fill, error):
            self._settle(fill)

    def _note(self, fill: Fill, error: Exception | None) -> bool:
        """Tell whether that was the last read of a fill."""
        with self._progress:
            fill.error = fill.error or error
            fill.num_left -= 1
            self._num_events += 1
            return fill.num_left == 0

    def _settle(self, fill: Fill) -> None:
        try:
            fill.extent.forget()
            if fill.error is None and not fill.is_dropped:
                fill.extent.verify(fill.slot.memory)
        except Exception as error:
            fill.error = error
        with self._progress:
            fill.is_settled = True
            self._num_events += 1
            self._progress.notify_all()

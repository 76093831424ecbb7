"""Whatever a device does late, what it computes with is what was read: extents arrive ahead, and nothing is stale."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cluster.errors import StorageError
from tests.worker.stream.disk import PLAN, flip_byte, make_extents
from tests.worker.stream.simulated_device import SimulatedDevice, SimulatedEvent, SimulatedStream
from worker.stream.device_source import DeviceSource
from worker.stream.readers import Readers, make_slots
from worker.stream.ring import ReadCounters, SliceRing
from worker.stream.streamed_file import Extent, StreamedFile

SIZES = (4096, 1000, 4096, 2048, 3000)
DEVICES = ("", "copying", "computing")


class Host:
    """A HostSource whose slots are written again as soon as they are released."""

    def __init__(self, device: SimulatedDevice, is_ahead: Any = lambda: True) -> None:
        file = StreamedFile("block-0003", Path("nowhere"), is_direct=False)
        self.slots = make_slots(3, max(SIZES))
        self.extents = [Extent(file, 0, size, ()) for size in SIZES]
        generator = torch.Generator().manual_seed(0)
        contents = [torch.randint(256, (size,), generator=generator).byte() for size in SIZES]
        self.written = dict(zip(self.extents, contents, strict=True))
        self.num_stalls, self.is_failing = 0, False
        self._device, self._is_ahead = device, is_ahead
        self._next, self._held = 0, -1
        self._arrived: Extent | None = None

    def fetch(self, extent: Extent) -> Tensor:
        assert self._held < 0
        if self._arrived is not extent:
            self.num_stalls += 1
            assert not self._device.computing.todo  # or it would be no stall
        if self.is_failing:
            raise StorageError("block-0003 cannot be read")
        place = self.extents.index(extent)
        self._held, self._next, self._arrived = place % 3, (place + 1) % len(SIZES), None
        tensor = self.slots[self._held].tensor
        tensor[: extent.num_bytes] = self.written[extent]
        return tensor

    def arrived(self) -> Extent | None:
        if self._arrived is None and self._is_ahead():
            self._arrived = self.extents[self._next]
        return self._arrived

    def release(self) -> None:
        if self._held >= 0:
            self.slots[self._held].tensor.fill_(0xEE)
            self._held = -1


class Pass:
    """Computes with extents on a device, and notes whether each computation found what was written."""

    def __init__(self, device: SimulatedDevice, host: Host) -> None:
        self.device, self.host, self.counters = device, host, ReadCounters()
        self.source = DeviceSource(host, device, self.counters)
        self.source.pin()
        self.found: list[bool] = []

    def visit(self, *places: int) -> None:
        for place in places:
            extent = self.host.extents[place]
            memory = self.source.take(extent)
            for part in (slice(10), slice(10, extent.num_bytes)):
                self.device.compute(lambda m=memory[part], e=self.host.written[extent][part]: self._compare(m, e))  # type: ignore[misc]

    def end(self) -> bool:
        """End a pass; tell whether everything was right so far."""
        self.source.release()
        self.device.finish()
        return all(self.found)

    def _compare(self, memory: Tensor, written: Tensor) -> None:
        self.found.append(torch.equal(memory, written))


JUMPS = st.lists(st.lists(st.integers(0, 4), max_size=8), max_size=4)


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2**32), JUMPS, st.sampled_from((*DEVICES, None)))
def test_every_computation_finds_what_was_written(seed: int, jumps: list[list[int]], eager: str | None) -> None:
    chance = random.Random(seed)
    device = SimulatedDevice(chance if eager is None else eager)
    computed = Pass(device, Host(device, lambda: chance.random() < 0.7))
    for jump in jumps:
        computed.visit(0, 1, 2, 2, 3, 4, 0, *jump)
        assert computed.end()
    assert len(computed.found) == sum(2 * (7 + len(jump)) for jump in jumps)


class NoWaitForComputing(SimulatedDevice):
    def copy(self, source: Tensor, target: Tensor, after: Any) -> SimulatedEvent:  # noqa: ARG002
        return super().copy(source, target, SimulatedEvent(SimulatedStream(), has_passed=True))


class NoWaitForCopying(SimulatedDevice):
    def copy(self, source: Tensor, target: Tensor, after: Any) -> SimulatedEvent:
        super().copy(source, target, after)
        return SimulatedEvent(self.copying, has_passed=True)


class EarlyMark(SimulatedDevice):
    def mark(self) -> SimulatedEvent:
        return SimulatedEvent(self.computing, has_passed=True)

    def finish(self) -> None:
        super().mark().synchronize()


@pytest.mark.parametrize("device", [NoWaitForComputing, NoWaitForCopying, EarlyMark])
def test_a_wait_that_is_missing_is_noticed(device: type[SimulatedDevice]) -> None:
    def is_right(eager: str) -> bool:
        made = device(eager)
        computed = Pass(made, Host(made))
        computed.visit(0, 1, 2, 3, 4, 0)
        return computed.end()

    assert not all(is_right(eager) for eager in DEVICES)


def test_the_next_extent_is_copied_while_one_is_computed_with() -> None:
    device = SimulatedDevice(eager="copying")
    computed = Pass(device, Host(device))
    computed.visit(0)
    assert (computed.found, device.num_copies, bool(device.copying.todo)) == ([], 2, False)
    computed.visit(1)
    assert computed.found == []  # and the host has not waited for it
    assert computed.end()


def test_waiting_for_the_disk_is_a_stall_only_when_nothing_is_left_to_compute() -> None:
    device = SimulatedDevice()
    computed = Pass(device, Host(device, lambda: False))
    computed.visit(0, 1, 2)
    assert computed.host.num_stalls == 3
    assert computed.end()


def test_a_pass_counts_what_it_used_and_leaves_the_first_extent_for_the_next() -> None:
    device = SimulatedDevice()
    computed = Pass(device, Host(device))
    for _ in range(3):
        computed.counters.read_bytes = 0
        computed.visit(0, 1, 2, 3, 4)
        assert computed.end()
        assert computed.counters.read_bytes == sum(SIZES)
    assert device.num_copies == 16
    assert computed.host.num_stalls == 0


def test_a_read_that_fails_is_raised_and_the_next_pass_is_right() -> None:
    device = SimulatedDevice()
    computed = Pass(device, Host(device, lambda: False))
    computed.visit(0, 1)
    computed.host.is_failing = True
    for _ in range(3):
        with pytest.raises(StorageError, match="block-0003"):
            computed.visit(2)
    computed.host.is_failing = False
    assert computed.end()
    computed.visit(0, 1, 2, 3)
    assert computed.end()


@pytest.mark.parametrize("eager", DEVICES)
def test_closing_waits_for_copies_and_unpins(eager: str) -> None:
    device = SimulatedDevice(eager)
    computed = Pass(device, Host(device))
    computed.visit(0)
    (pinned,) = device.pinned
    assert pinned.nbytes == sum(slot.tensor.nbytes for slot in computed.host.slots)
    for _ in range(2):
        computed.source.close()
        assert not device.pinned


class RingPass:
    """Passes of a real part, through a real ring."""

    def __init__(self, folder: Path, device: SimulatedDevice) -> None:
        self.file, self._extents = make_extents(folder, (1, 5, 2, 4, 3))
        self._content = self.file.path.read_bytes()
        self.counters, self._readers = ReadCounters(), Readers(PLAN)
        slot_bytes = max(extent.num_bytes for extent in self._extents)
        ring = SliceRing(self._readers, self.counters, ring_bytes=3 * slot_bytes, slot_bytes=slot_bytes)
        self._source = DeviceSource(ring, device, self.counters)
        self._source.pin()
        ring.set_order(self._extents)

    def run(self, num_passes: int) -> bool:
        """Tell whether all passes bring what is in the file and count as much."""
        self.counters.read_bytes = 0
        all_right = [self._is_right(extent) for _ in range(num_passes) for extent in self._extents]
        self._source.release()
        return all(all_right) and self.counters.read_bytes == num_passes * sum(e.num_bytes for e in self._extents)

    def flip(self) -> None:
        flip_byte(self.file.path, self._extents[3].offset + 9)

    def close(self) -> None:
        self._source.close()
        self._readers.close()
        self.file.close()

    def _is_right(self, extent: Extent) -> bool:
        expected = self._content[extent.offset : extent.offset + extent.num_bytes]
        return bytes(self._source.take(extent)[: extent.num_bytes].numpy()) == expected


@pytest.mark.parametrize("eager", DEVICES)
def test_what_passes_through_the_ring_arrives_and_damage_is_named(tmp_path: Path, eager: str) -> None:
    passes = RingPass(tmp_path, SimulatedDevice(eager))
    assert all(passes.run(1) for _ in range(20))
    passes.flip()
    with pytest.raises(StorageError, match=r"w3\.weight of block-0003 .*checksum"):
        passes.run(3)  # the ring and the device had some slices before
    passes.flip()
    assert passes.run(2)
    passes.close()

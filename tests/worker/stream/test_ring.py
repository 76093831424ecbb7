"""The ring hands out what was written, in order, ahead of time, and nothing stale."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import xxhash

from cluster.errors import ConfigurationError, InvariantError, StageTimeoutError, StorageError
from tests.worker.stream.disk import PLAN, Disk, flip_byte, make_extents, part_path
from worker.store.manifest import ALIGNMENT
from worker.stream.readers import Readers
from worker.stream.ring import ReadCounters, SliceRing
from worker.stream.streamed_file import Extent, StreamedFile

PART = "block-0003"


class Rings:
    """Makes rings and ends what they started."""

    def __init__(self) -> None:
        self._ends: list[Callable[[], None]] = []
        self.counters = ReadCounters()

    def make(
        self, file: StreamedFile, extents: tuple[Extent, ...], *, num_slots: int = 3, hang_seconds: float = 30.0
    ) -> SliceRing:
        readers = Readers(PLAN, hang_seconds=hang_seconds)
        slot = max(extent.num_bytes for extent in extents)
        self._ends += [readers.close, file.close]
        ring = SliceRing(readers, self.counters, ring_bytes=num_slots * slot, slot_bytes=slot)
        ring.set_order(extents)
        return ring

    def close(self) -> None:
        for end in self._ends:
            end()


@pytest.fixture
def rings() -> Iterator[Rings]:
    made = Rings()
    yield made
    made.close()


def is_right(ring: SliceRing, extent: Extent) -> bool:
    """Take an extent and compare it with its checksum."""
    memory = ring.take(extent)
    tensors = ((check, memory[check.start : check.start + check.num_bytes].numpy()) for check in extent.checks)
    return all(xxhash.xxh3_128_hexdigest(tensor) == check.checksum for check, tensor in tensors)


def test_slices_of_different_sizes_pass_through_three_slots_again_and_again(tmp_path: Path, rings: Rings) -> None:
    file, extents = make_extents(tmp_path, (1, 16, 2, 15, 9))
    ring = rings.make(file, extents)
    for _ in range(4):
        assert all(is_right(ring, extent) for extent in extents)
    assert rings.counters.read_bytes == 4 * sum(extent.num_bytes for extent in extents)


def test_taking_the_same_slice_again_reads_nothing(tmp_path: Path, rings: Rings) -> None:
    file, extents = make_extents(tmp_path)
    ring = rings.make(file, extents)
    first = ring.take(extents[0])
    assert ring.take(extents[0]) is first
    assert rings.counters.read_bytes == extents[0].num_bytes


def test_an_idle_ring_fills_up_across_the_end_of_the_span_and_stops(tmp_path: Path, rings: Rings) -> None:
    disk = Disk()
    file, extents = make_extents(tmp_path, (2, 2, 2, 2), read_at=disk.read_at)
    ring = rings.make(file, extents)
    for extent in extents:
        ring.take(extent)
    ring.release()
    disk.until(lambda: len(disk.begun) == 7)
    begun = list(disk.begun)
    disk.begun.clear()
    assert [begun.count(extent.offset) for extent in extents] == [2, 2, 2, 1]
    assert is_right(ring, extents[0])
    assert disk.begun in ([], [extents[3].offset])


def test_reads_of_later_slices_begin_while_a_slice_is_computed_with(tmp_path: Path, rings: Rings) -> None:
    disk = Disk(is_open=False)
    file, extents = make_extents(tmp_path, (2, 2, 2, 2, 2), read_at=disk.read_at)
    ring = rings.make(file, extents)
    for index, extent in enumerate(extents):
        disk.allow(1)
        ring.take(extent)
        # computing: nothing is asked of the ring, and yet the disk works on the next two slices
        later = [extents[(index + ahead) % 5].offset for ahead in (1, 2)]
        disk.until(lambda later=later: disk.begun[-2:] == later)  # type: ignore[misc]
    disk.open()


@pytest.mark.parametrize("jump", [[0, 1, 0], [0, 3], [2, 1, 0], [0, 2, 3, 1]])
def test_any_order_gives_the_right_bytes(tmp_path: Path, rings: Rings, jump: list[int]) -> None:
    file, extents = make_extents(tmp_path)
    ring = rings.make(file, extents)
    for index in jump * 3:
        assert is_right(ring, extents[index])


def test_skipping_a_slice_keeps_what_was_read_behind_it(tmp_path: Path, rings: Rings) -> None:
    disk = Disk()
    file, extents = make_extents(tmp_path, (2, 2, 2, 2, 2), read_at=disk.read_at)
    ring = rings.make(file, extents)
    disk.until(lambda: len(disk.begun) == 3)
    assert is_right(ring, extents[1])
    assert is_right(ring, extents[2])
    assert disk.begun.count(extents[2].offset) == 1


def test_a_slot_still_written_for_a_dropped_slice_is_not_handed_out(tmp_path: Path, rings: Rings) -> None:
    disk = Disk(is_open=False)
    file, extents = make_extents(tmp_path, (2, 2, 2, 2, 2, 2), read_at=disk.read_at)
    ring = rings.make(file, extents)
    disk.until(lambda: len(disk.begun) == 3)  # all readers hang in slices 0, 1 and 2
    threading.Thread(target=lambda: (disk.until(lambda: len(disk.begun) > 3), disk.open())).start()
    disk.allow(2)
    assert is_right(ring, extents[5])
    assert is_right(ring, extents[0])


def test_a_changed_order_is_followed(tmp_path: Path, rings: Rings) -> None:
    file, extents = make_extents(tmp_path)
    ring = rings.make(file, extents)
    ring.take(extents[0])
    ring.set_order(extents[1:3])
    for extent in (*extents[1:3], *extents[1:3]):
        assert is_right(ring, extent)
    with pytest.raises(InvariantError, match=PART):
        ring.take(extents[0])


def test_a_drained_ring_reads_nothing_until_asked(tmp_path: Path, rings: Rings) -> None:
    disk = Disk()
    file, extents = make_extents(tmp_path, read_at=disk.read_at)
    ring = rings.make(file, extents)
    ring.take(extents[0])
    ring.drain()
    num_begun = len(disk.begun)
    ring.release()
    assert len(disk.begun) <= num_begun + PLAN.num_readers + 1  # what the threads had in hand
    assert is_right(ring, extents[1])


@pytest.mark.parametrize("num_slices", [1, 4])
def test_a_flipped_bit_fails_the_pass_that_needs_it_and_not_the_one_after_repair(
    tmp_path: Path, rings: Rings, num_slices: int
) -> None:
    file, extents = make_extents(tmp_path, (2, 3, 2, 4)[:num_slices])
    flip_byte(file.path, extents[-1].offset + 5)
    ring = rings.make(file, extents)
    for _ in range(2):
        assert all(is_right(ring, extent) for extent in extents[:-1])
        with pytest.raises(StorageError, match=rf"w{num_slices - 1}\.weight of {PART} .*{file.path}.*checksum"):
            ring.take(extents[-1])
    flip_byte(file.path, extents[-1].offset + 5)
    assert all(is_right(ring, extent) for extent in extents)


def test_a_replaced_file_is_opened_anew_after_a_failure(tmp_path: Path, rings: Rings) -> None:
    file, extents = make_extents(tmp_path)
    good = file.path.read_bytes()
    flip_byte(file.path, extents[1].offset)
    ring = rings.make(file, extents)
    with pytest.raises(StorageError):
        ring.take(extents[1])
    file.path.with_suffix(".new").write_bytes(good)
    file.path.with_suffix(".new").rename(file.path)
    assert all(is_right(ring, extent) for extent in extents)


def test_a_truncated_file_is_named_with_the_tensor_and_what_is_left_of_it(tmp_path: Path, rings: Rings) -> None:
    file, extents = make_extents(tmp_path)
    good = file.path.read_bytes()
    os.truncate(file.path, left := extents[2].offset + 100)
    ring = rings.make(file, extents)
    assert is_right(ring, extents[1])
    for extent, tensor in ((extents[2], "w2"), (extents[3], "w3")):
        with pytest.raises(StorageError, match=rf"{tensor}\.weight of {PART} .*ends after {left:,} bytes.*cut short"):
            ring.take(extent)
    file.path.write_bytes(good)
    assert is_right(ring, extents[2])


def test_a_disk_error_is_named_and_forgotten(tmp_path: Path, rings: Rings) -> None:
    disk = Disk()
    disk.failing = True
    file, extents = make_extents(tmp_path, read_at=disk.read_at)
    ring = rings.make(file, extents)
    with pytest.raises(StorageError, match=rf"w0\.weight of {PART} .*Input/output error"):
        ring.take(extents[0])
    disk.failing = False
    assert all(is_right(ring, extent) for extent in extents)


def test_an_error_from_before_the_pass_is_not_the_pass_s(tmp_path: Path, rings: Rings) -> None:
    disk = Disk()
    disk.failing = True
    file, extents = make_extents(tmp_path, read_at=disk.read_at)
    ring = rings.make(file, extents)
    readers = ring._readers
    readers.wait([ring._ahead[0]])
    disk.failing = False
    assert is_right(ring, extents[0])


def test_a_vanished_file_is_read_as_long_as_it_is_open(tmp_path: Path, rings: Rings) -> None:
    file, extents = make_extents(tmp_path)
    ring = rings.make(file, extents)
    ring.take(extents[0])
    part_path(tmp_path, PART).unlink()
    assert all(is_right(ring, extent) for extent in extents)


def test_a_file_that_vanished_before_it_was_opened_is_named(tmp_path: Path, rings: Rings) -> None:
    file, extents = make_extents(tmp_path)
    file.path.unlink()
    ring = rings.make(file, extents)
    with pytest.raises(StorageError, match=rf"{PART} .*No such file"):
        ring.take(extents[0])


def test_a_hung_disk_is_a_timeout_that_names_the_block(tmp_path: Path, rings: Rings) -> None:
    disk = Disk(is_open=False)
    file, extents = make_extents(tmp_path, read_at=disk.read_at)
    ring = rings.make(file, extents, hang_seconds=0.01)
    with pytest.raises(StageTimeoutError, match=PART):
        ring.take(extents[0])
    disk.open()
    ring._readers.wait(ring._dropped)
    assert is_right(ring, extents[0])


def test_a_ring_of_fewer_than_three_slices_is_refused(tmp_path: Path, rings: Rings) -> None:
    file, extents = make_extents(tmp_path)
    with pytest.raises(ConfigurationError, match=f"need {3 * 4 * ALIGNMENT:,}"):
        rings.make(file, extents, num_slots=2)


def test_a_thousand_passes_leak_nothing(tmp_path: Path, rings: Rings) -> None:
    file, extents = make_extents(tmp_path)
    ring = rings.make(file, extents)
    process = psutil.Process()

    def held() -> tuple[int, int, int]:
        gc.collect()
        return process.num_fds(), process.num_threads(), len(gc.get_objects())

    def run(num_passes: int) -> None:
        for _ in range(num_passes):
            for extent in extents:
                ring.take(extent)

    run(50)
    before, memory = held(), process.memory_info().rss
    run(1000)
    after = held()
    assert after[:2] == before[:2]
    assert after[2] <= before[2] + 50
    assert process.memory_info().rss < memory + (8 << 20)


def test_closing_ends_the_threads(tmp_path: Path, rings: Rings) -> None:
    before = set(threading.enumerate())
    file, extents = make_extents(tmp_path)
    rings.make(file, extents).take(extents[0])
    assert len(set(threading.enumerate()) - before) == PLAN.num_readers + 1
    rings.close()
    assert not set(threading.enumerate()) - before

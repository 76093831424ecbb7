"""Experts are read when chosen, all missing ones at once, and the often chosen ones stay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import xxhash

from cluster.errors import ConfigurationError, StorageError
from tests.worker.stream.disk import PLAN, Disk, flip_byte, make_extents
from worker.store.manifest import ALIGNMENT
from worker.stream.experts import ExpertCache
from worker.stream.readers import Readers
from worker.stream.ring import ReadCounters
from worker.stream.streamed_file import Extent

EXPERT_BYTES = 2 * ALIGNMENT


class Block:
    """A block of eight experts and a cache for some of them."""

    def __init__(self, folder: Path, num_slots: int, disk: Disk) -> None:
        self.file, extents = make_extents(folder, (2,) * 8, read_at=disk.read_at)
        self.experts = dict(enumerate(extents))
        self.counters = ReadCounters()
        self.readers = Readers(PLAN)
        self.cache = ExpertCache(
            self.readers, self.counters, cache_bytes=num_slots * EXPERT_BYTES, slot_bytes=EXPERT_BYTES
        )

    def visit(self, *chosen: int) -> list[int]:
        """Take what was chosen and compare it with its checksum; return the order of arrival."""
        order = []
        for number in self.cache.arrivals(self.experts, chosen):
            assert is_right(self.cache, self.experts[number])
            order.append(number)
        return order

    def num_read(self) -> int:
        """Return how many experts were read since the last call."""
        num_read, self.counters.read_bytes = self.counters.read_bytes // EXPERT_BYTES, 0
        return num_read


def is_right(cache: ExpertCache, extent: Extent) -> bool:
    """Compare an expert in memory with its checksum."""
    (check,) = extent.checks
    return xxhash.xxh3_128_hexdigest(cache.take(extent)[: check.num_bytes].numpy()) == check.checksum


@contextmanager
def opened(folder: Path, num_slots: int, disk: Disk | None = None) -> Iterator[Block]:
    """Open a block and close it."""
    block = Block(folder, num_slots, disk or Disk())
    yield block
    block.readers.close()
    block.file.close()


def test_an_expert_in_memory_is_not_read_again(tmp_path: Path) -> None:
    with opened(tmp_path, 4) as block:
        block.visit(1, 2)
        assert block.num_read() == 2
        block.visit(1, 2)
        assert block.num_read() == 0
        assert block.cache.cached_bytes == 2 * EXPERT_BYTES


def test_experts_in_memory_come_first_while_all_others_are_being_read(tmp_path: Path) -> None:
    disk = Disk()
    with opened(tmp_path, 4, disk) as block:
        block.visit(5)
        disk.begun.clear()
        arrivals = block.cache.arrivals(block.experts, [1, 3, 5])
        assert next(arrivals) == 5
        disk.until(lambda: len(disk.begun) == 2)  # while expert 5 is computed with
        assert list(arrivals) == [1, 3]


def test_more_experts_than_slots_pass_in_turn(tmp_path: Path) -> None:
    with opened(tmp_path, 2) as block:
        assert sorted(block.visit(*range(8))) == list(range(8))
        assert block.num_read() == 8


def test_the_often_chosen_stay_through_scans_of_the_others(tmp_path: Path) -> None:
    with opened(tmp_path, 3) as block:
        for _ in range(5):
            block.visit(0, 1)
        block.num_read()
        for rare in (2, 3, 4, 5, 6, 7):
            block.visit(0, 1)
            block.visit(rare)
        assert block.num_read() == 6


def test_the_once_popular_is_forgotten(tmp_path: Path) -> None:
    with opened(tmp_path, 2) as block:
        for _ in range(20):
            block.visit(0)
        for _ in range(100):
            block.visit(1)
            block.visit(2)
        block.num_read()
        block.visit(1)
        block.visit(2)
        assert block.num_read() == 0


def test_a_damaged_expert_is_named_and_read_anew_after_repair(tmp_path: Path) -> None:
    with opened(tmp_path, 3) as block:
        flip_byte(block.file.path, block.experts[4].offset)
        for _ in range(2):
            with pytest.raises(StorageError, match=r"w4\.weight of block-0003"):
                block.visit(3, 4)
        flip_byte(block.file.path, block.experts[4].offset)
        assert sorted(block.visit(3, 4, 5, 6)) == [3, 4, 5, 6]


def test_a_step_given_up_midway_does_not_hinder_the_next(tmp_path: Path) -> None:
    disk = Disk(is_open=False)
    with opened(tmp_path, 2, disk) as block:
        disk.allow(1)
        arrivals = block.cache.arrivals(block.experts, [0, 1])
        next(arrivals)
        arrivals.close()  # type: ignore[attr-defined]
        disk.open()
        assert sorted(block.visit(4, 5, 6)) == [4, 5, 6]


def test_a_cache_of_one_expert_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="2 experts"), opened(tmp_path, 1):
        pass

"""Whoever waits for a read learns how it ended, whatever it ended with."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from tests.worker.stream.disk import PLAN, make_extents
from worker.stream.readers import Readers, make_slots
from worker.stream.streamed_file import Extent


@pytest.mark.parametrize("step", ["read", "verify"])
def test_any_exception_in_a_reader_thread_reaches_whoever_waits_and_later_reads_go_on(
    tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    file, (extent, *_) = make_extents(tmp_path)
    (slot,) = make_slots(1, extent.num_bytes)
    with closing(file), closing(Readers(PLAN, hang_seconds=30.0)) as readers:
        with monkeypatch.context() as patch:
            patch.setattr(Extent, step, fail)
            for _ in range(PLAN.num_readers + 2):  # one more than there are threads
                failed = readers.start(extent, slot)
                readers.wait([failed])
                assert isinstance(failed.error, MemoryError)
        whole = readers.start(extent, slot)
        readers.wait([whole])
        assert whole.error is None


def test_the_page_cache_forgets_an_extent_as_a_whole_once_all_of_it_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read by read it would keep whatever reads ahead brought in one piece with what follows."""
    reads: list[int] = []
    forgotten: list[tuple[int, int, int]] = []

    def read_at(descriptor: int, memory: Sequence[memoryview], offset: int) -> int:
        reads.append(offset)
        return os.preadv(descriptor, memory, offset)

    def advise(_: int, offset: int, length: int, advice: int) -> None:
        forgotten.append((offset, length, advice))
        assert len(reads) == -(-extent.num_bytes // PLAN.read_bytes)

    file, (*_, extent) = make_extents(tmp_path, read_at=read_at)
    (slot,) = make_slots(1, extent.num_bytes)
    monkeypatch.setattr(os, "posix_fadvise", advise)
    with closing(file), closing(Readers(PLAN)) as readers:
        fill = readers.start(extent, slot)
        readers.wait([fill])
    assert fill.error is None
    assert forgotten == [(0, extent.offset + extent.num_bytes, os.POSIX_FADV_DONTNEED)]

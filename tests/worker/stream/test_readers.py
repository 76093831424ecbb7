"""Whoever waits for a read learns how it ended, whatever it ended with."""

from __future__ import annotations

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

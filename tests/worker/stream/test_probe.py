"""The probe chooses by measured speed, and reads nothing twice."""

from __future__ import annotations

import errno
import os
from itertools import count
from pathlib import Path

import pytest

from worker.stream import probe as probing
from worker.stream.probe import (
    BUFFERED_GAIN,
    CANDIDATES,
    DIRECT_GAIN,
    ProbeResult,
    choose,
    drop_cached,
    probe,
    supports_direct,
)

DIRECT, OTHER, BUFFERED = CANDIDATES[0], CANDIDATES[1], CANDIDATES[-1]


def test_other_reads_must_be_clearly_faster_and_buffered_ones_most_clearly() -> None:
    for plan, gain in ((OTHER, DIRECT_GAIN), (BUFFERED, BUFFERED_GAIN)):
        assert choose({DIRECT: 100.0, plan: 100.0 * gain - 1}) == ProbeResult(DIRECT, 100.0)
        assert choose({DIRECT: 100.0, plan: 100.0 * gain + 1}) == ProbeResult(plan, 100.0 * gain + 1)


def test_candidates_read_different_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "TRIAL_BYTES", 8192)
    path = tmp_path / "part"
    path.write_bytes(os.urandom(40 * 8192))
    places = list(probing._trials([path], 10))
    assert len(set(places)) == len(places) >= 10
    assert max(offset for _, offset in places) >= 30 * 8192


def test_a_probe_ends_with_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "TRIAL_BYTES", 8192)
    path = tmp_path / "part"
    path.write_bytes(os.urandom(40 * 8192))
    seconds = count()
    result = probe([path], clock=lambda: float(next(seconds)))
    assert result == ProbeResult(CANDIDATES[0 if supports_direct(path) else 3], 8192.0)
    assert next(seconds) < 6


def test_files_too_small_to_measure_are_read_as_the_device_allows(tmp_path: Path) -> None:
    path = tmp_path / "part"
    path.write_bytes(bytes(8192))
    result = probe([path])
    assert result.bytes_per_second == 0.0
    assert result.plan.is_direct == supports_direct(path)


def test_a_file_system_without_direct_reads_is_read_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "part"
    path.write_bytes(bytes(8192))
    system_open = os.open

    def refuse(path: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return system_open(path, flags)

    monkeypatch.setattr(os, "open", refuse)
    assert not supports_direct(path)
    assert not probe([path]).plan.is_direct


def test_cached_pages_are_dropped_before_they_are_timed(tmp_path: Path) -> None:
    path = tmp_path / "part"
    path.write_bytes(os.urandom(1 << 20))
    drop_cached(path, 0, 1 << 20)
    descriptor = os.open(path, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        os.preadv(descriptor, [bytearray(4096)], 512 << 10, os.RWF_NOWAIT)
    os.close(descriptor)

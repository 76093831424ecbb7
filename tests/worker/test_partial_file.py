from __future__ import annotations

from pathlib import Path

from worker.partial_file import PartialFile


def test_file_has_its_whole_size_and_only_the_bytes_that_were_written(tmp_path: Path) -> None:
    with PartialFile(tmp_path / "deep" / "f", 100) as part:
        part.write(10, b"abc")
        part.complete(10, 13)
        assert part.read(9, 14) == b"\0abc\0"
    assert (tmp_path / "deep" / "f").stat().st_size == 100


def test_completed_range_is_known_after_reopening_and_a_written_one_is_not(tmp_path: Path) -> None:
    with PartialFile(tmp_path / "f", 100) as part:
        part.write(0, b"a")
        part.complete(0, 1)
        part.write(1, b"b")
    with PartialFile(tmp_path / "f", 100) as part:
        assert part.has(0, 1)
        assert not part.has(1, 2)
        assert part.read(0, 2) == b"ab"


def test_two_workers_fill_one_file(tmp_path: Path) -> None:
    with PartialFile(tmp_path / "f", 10) as first, PartialFile(tmp_path / "f", 10) as second:
        first.write(0, b"first")
        second.write(5, b"other")
        first.complete(0, 5)
        second.complete(5, 10)
    with PartialFile(tmp_path / "f", 10) as part:
        assert part.has(0, 5)
        assert part.has(5, 10)
        assert part.read(0, 10) == b"firstother"

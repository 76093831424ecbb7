"""A file that somebody holds is not discarded."""

from __future__ import annotations

from pathlib import Path

from worker.held_files import HeldFiles, discard_file


def discarded(locks: Path, name: str) -> bool:
    deleted: list[str] = []
    discard_file(locks, name, lambda: deleted.append(name))
    return bool(deleted)


def test_a_file_is_discarded_by_the_last_who_held_it(tmp_path: Path) -> None:
    first, second = HeldFiles(tmp_path, ["a/b", "c"]), HeldFiles(tmp_path, ["a/b"])
    assert not discarded(tmp_path, "a/b")
    first.release("a/b")
    assert not discarded(tmp_path, "a/b")
    second.close()
    assert discarded(tmp_path, "a/b")
    assert not discarded(tmp_path, "c")
    first.close()
    assert discarded(tmp_path, "c")


def test_where_no_lock_can_be_written_nothing_is_discarded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    held = HeldFiles(tmp_path / "file", ["a"])
    assert not discarded(tmp_path / "file", "a")
    held.close()

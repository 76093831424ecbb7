"""What is dropped of the page cache, and what of a list of mappings is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from worker import libraries
from worker.libraries import forget_libraries


def test_files_that_are_mapped_are_forgotten_once_and_nothing_else_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "with a space.so"
    library.write_bytes(b"code")
    start = "7f0000000000-7f0000001000 r-xp 00000000 08:01 7"
    lines = [f"{start}    {library}", f"{start}    {library}", f"{start}    {tmp_path}/gone.so (deleted)"]
    lines += [f"{start}    /dev/zero", f"{start}    [heap]", start]
    (tmp_path / "maps").write_text("\n".join(lines))
    forgotten: list[int] = []
    monkeypatch.setattr(libraries, "forget_pages", forgotten.append)
    forget_libraries(tmp_path / "maps")
    assert len(forgotten) == 1


def test_systems_without_the_list_and_this_one_are_fine(tmp_path: Path) -> None:
    forget_libraries(tmp_path / "nothing")
    forget_libraries()

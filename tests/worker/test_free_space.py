from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import ConfigurationError
from worker.free_space import free_bytes, require_space

GIB = 1 << 30


def test_error_names_need_room_folder_and_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        require_space(tmp_path, 3 * GIB, measure=lambda _: 2 * GIB)
    assert caught.value.message.startswith(f"the weights of this span need 3.00 GiB in {tmp_path}, which has 2.00 GiB")
    assert "set --download-dir" in caught.value.message


def test_exact_room_is_enough(tmp_path: Path) -> None:
    require_space(tmp_path, GIB, measure=lambda _: GIB)


def test_what_is_to_stay_free_is_left(tmp_path: Path) -> None:
    require_space(tmp_path, GIB, measure=lambda _: 3 * GIB, reserve_bytes=2 * GIB)
    with pytest.raises(ConfigurationError, match=r"2\.00 GiB are to stay free \(--disk-reserve\)"):
        require_space(tmp_path, GIB, measure=lambda _: 3 * GIB - 1, reserve_bytes=2 * GIB)


def test_nothing_to_download_needs_no_room(tmp_path: Path) -> None:
    require_space(tmp_path, 0, measure=lambda _: 0, reserve_bytes=GIB)


def test_folder_that_does_not_exist_yet_is_measured_where_it_would_be(tmp_path: Path) -> None:
    measured: list[Path] = []

    def measure(folder: Path) -> int:
        measured.append(folder)
        return 1

    require_space(tmp_path / "not" / "yet", 1, measure=measure)
    assert measured == [tmp_path]


def test_this_machine_has_room_for_a_byte(tmp_path: Path) -> None:
    assert free_bytes(tmp_path) > 0

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import ConfigurationError
from worker.store.room import require_room, used_bytes

GIB = 1 << 30


def test_exact_room_is_enough(tmp_path: Path) -> None:
    require_room(tmp_path / "not" / "yet", 2 * GIB, reserve_bytes=GIB, measure=lambda _: 3 * GIB)


def test_a_disk_without_room_is_refused_with_numbers_and_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        require_room(tmp_path, 3 * GIB, reserve_bytes=2 * GIB, measure=lambda _: 4 * GIB)
    for word in ("3.00 GiB", "4.00 GiB free", "2.00 GiB are to stay free", "cluster store prune", "--store-dir"):
        assert word in caught.value.message


def test_a_download_to_the_same_disk_counts(tmp_path: Path) -> None:
    require_room(tmp_path, GIB, source_bytes=2 * GIB, measure=lambda _: 3 * GIB)
    with pytest.raises(ConfigurationError, match=r"and the 2\.00 GiB of the checkpoint to be downloaded, do not fit"):
        require_room(tmp_path, GIB, source_bytes=2 * GIB, measure=lambda _: 3 * GIB - 1)


def test_a_quota_counts_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "key").mkdir()
    (tmp_path / "key" / "block-0000.weights").write_bytes(bytes(100))
    require_room(tmp_path, 50, quota_bytes=150, measure=lambda _: GIB)
    with pytest.raises(ConfigurationError, match="raise --store-quota"):
        require_room(tmp_path, 51, quota_bytes=150, measure=lambda _: GIB)


def test_a_folder_that_does_not_exist_takes_nothing(tmp_path: Path) -> None:
    assert used_bytes(tmp_path / "none") == 0

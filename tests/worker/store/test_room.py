from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from cluster.errors import ConfigurationError
from cluster.load_order import StoreOptions
from worker.store import room as room_module
from worker.store.room import promised_room, used_bytes

GIB = 1 << 30


def room(
    root: Path, parts: Mapping[str, int], *, free: int = GIB, downloads: Mapping[str, int] | None = None, **limits: int
) -> AbstractContextManager[None]:
    """Promise room for files below `root`."""
    sizes, wanted = ({root / name: size for name, size in files.items()} for files in (parts, downloads or {}))
    return promised_room(root, sizes, StoreOptions(**limits), lambda _: free, wanted)  # type: ignore[arg-type]


def write(path: Path, num_bytes: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(num_bytes))


def test_exact_room_is_enough(tmp_path: Path) -> None:
    with room(tmp_path / "not" / "yet", {"part": 2 * GIB}, reserve_bytes=GIB, free=3 * GIB):
        pass


def test_a_disk_without_room_is_refused_with_numbers_and_way_out(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigurationError) as caught,
        room(tmp_path, {"part": 3 * GIB}, reserve_bytes=2 * GIB, free=4 * GIB),
    ):
        pass
    for word in ("3.00 GiB", "4.00 GiB free", "2.00 GiB are to stay free", "cluster store prune", "--store-dir"):
        assert word in caught.value.message


def test_a_download_to_the_same_disk_counts(tmp_path: Path) -> None:
    with room(tmp_path, {"part": GIB}, downloads={"shard": 2 * GIB}, free=3 * GIB):
        pass
    with (
        pytest.raises(ConfigurationError, match=r"and the 2\.00 GiB of the checkpoint to be downloaded, do not fit"),
        room(tmp_path, {"part": GIB}, downloads={"shard": 2 * GIB}, free=3 * GIB - 1),
    ):
        pass


def test_a_quota_counts_what_is_there(tmp_path: Path) -> None:
    write(tmp_path / "key" / "block-0000.weights", 100)
    with room(tmp_path, {"part": 50}, quota_bytes=150):
        pass
    with pytest.raises(ConfigurationError, match="raise --store-quota"), room(tmp_path, {"part": 51}, quota_bytes=150):
        pass


def test_what_another_promised_is_taken_until_it_is_done(tmp_path: Path) -> None:
    limits = {"quota_bytes": 150, "free": 150}
    with room(tmp_path, {"a": 100}, downloads={"shard": 20}, free=150):
        with (
            pytest.raises(ConfigurationError, match="other workers are about to write"),
            room(tmp_path, {"b": 51}, quota_bytes=150),
        ):
            pass
        with (
            pytest.raises(ConfigurationError, match="for what other workers are about to write"),
            room(tmp_path, {"b": 31}, free=150),
        ):
            pass
        with room(tmp_path, {"b": 30}, **limits):
            pass
    with room(tmp_path, {"b": 150}, **limits):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_two_are_to_write_counts_once(tmp_path: Path) -> None:
    with (
        room(tmp_path, {"a": 60, "b": 40}, quota_bytes=100, free=120, downloads={"shard": 20}),
        room(tmp_path, {"b": 40}, quota_bytes=100, free=120, downloads={"shard": 20}),
    ):
        pass


def test_of_a_promise_counts_what_is_not_written_yet(tmp_path: Path) -> None:
    with room(tmp_path, {"a": 60, "b": 40}, quota_bytes=200):
        write(tmp_path / "a", 55)  # smaller than was promised
        write(tmp_path / "b.part", 30)
        with room(tmp_path, {"c": 105}, quota_bytes=200, free=115):
            pass
        with pytest.raises(ConfigurationError), room(tmp_path, {"c": 106}, quota_bytes=200):
            pass
        with pytest.raises(ConfigurationError), room(tmp_path, {"c": 106}, free=115):
            pass


def test_a_download_to_another_disk_is_not_the_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setattr(room_module, "_device", lambda folder: int(folder.is_relative_to(other)))

    def free(folder: Path) -> int:
        return 100 if folder == other else 50

    downloads = {other / "not-there" / "shard": 100}
    with promised_room(tmp_path, {tmp_path / "part": 50}, StoreOptions(), free, downloads):
        pass
    with (
        pytest.raises(ConfigurationError, match="--download-dir"),
        promised_room(tmp_path, {tmp_path / "part": 20}, StoreOptions(reserve_bytes=1), free, downloads),
    ):
        pass


def test_a_folder_that_does_not_exist_takes_nothing(tmp_path: Path) -> None:
    assert used_bytes(tmp_path / "none") == 0

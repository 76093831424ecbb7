from __future__ import annotations

import errno
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from cluster.errors import ConfigurationError, NotFoundError
from cluster.model_spec import Precision
from tests.worker.store.parts import PART, make_store, names, write
from worker.store.folder import BlockStore, StoreDescription
from worker.store.inventory import Pruned, find_entries, list_entries, prune, prune_leftovers, remove_parts
from worker.store.reader import PartFile
from worker.stream.streamed_file import StreamedFile


def test_the_store_used_last_is_listed_first(tmp_path: Path) -> None:
    for precision, used in ((Precision.INT8, 5.0), (Precision.NF4, 9.0), (Precision.BF16, 1.0)):
        store = make_store(tmp_path, precision)
        write(store, precision=precision)
        os.utime(store.folder / "model.json", (used, used))
    entries = list_entries(tmp_path)
    assert [entry.description.precision for entry in entries if entry.description] == ["nf4", "int8", "bf16"]
    assert [entry.last_used for entry in entries] == [9.0, 5.0, 1.0]


def test_an_entry_tells_what_is_there_and_what_is_missing(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    write(store)
    (store.folder / "head.weights.123.part").write_bytes(bytes(7))
    (entry,) = list_entries(tmp_path)
    assert entry.parts == (PART,)
    assert entry.missing == ("embedding", "block-0001", "head")
    assert entry.leftover_bytes == 7
    assert entry.num_bytes == sum(path.stat().st_size for path in store.folder.iterdir())
    assert not entry.is_other_version


def test_a_damaged_part_is_told_as_such_and_as_missing(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    for part in (PART, "block-0001", "head"):
        write(store, part)
    store.path(PART).unlink()
    os.truncate(store.manifest_path("head"), 0)
    (entry,) = list_entries(tmp_path)
    assert entry.parts == (PART, "block-0001", "head")
    assert entry.damaged == (PART, "head")
    assert entry.missing == ("embedding", PART, "head")


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "model.json", "yarn.lock", "model.safetensors", "cat.part"):
        (tmp_path / "checkpoint").mkdir(exist_ok=True)
        (tmp_path / "checkpoint" / name).write_text("{}")
    assert list_entries(tmp_path) == []
    assert list_entries(tmp_path / "none") == []


def test_other_files_beside_parts_are_neither_parts_nor_pruned(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    write(store)
    for name in ("config.json", "tokenizer.json"):
        (store.folder / name).write_text("{}")
    (entry,) = list_entries(tmp_path)
    assert entry.parts == (PART,)
    assert prune(entry).in_use == ()
    assert {path.name for path in store.folder.iterdir()} == {"config.json", "tokenizer.json"}


def test_a_folder_is_found_by_key_its_beginning_or_the_models_name(tmp_path: Path) -> None:
    for precision in (Precision.INT8, Precision.NF4):
        write(make_store(tmp_path, precision), precision=precision)
    key = make_store(tmp_path, Precision.NF4).key
    assert [entry.key for entry in find_entries(tmp_path, key)] == [key]
    assert [entry.key for entry in find_entries(tmp_path, "owner--model-nf4")] == [key]
    assert len(find_entries(tmp_path, "owner/model")) == 2
    with pytest.raises(NotFoundError, match=r"owner--model could mean .*int8.*: say more"):
        find_entries(tmp_path, "owner--model")
    with pytest.raises(NotFoundError, match="is called 'bloom': `cluster store list`"):
        find_entries(tmp_path, "bloom")


def test_pruning_removes_the_folder_and_tells_its_bytes(tmp_path: Path) -> None:
    write(make_store(tmp_path))
    (entry,) = list_entries(tmp_path)
    pruned = prune(entry)
    assert (pruned.num_bytes, pruned.in_use) == (entry.num_bytes, ())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_stays_whole_while_one_part_of_it_is_read_or_converted(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    for part in (PART, "block-0001", "head"):
        write(store, part)
    before = names(store)
    (entry,) = list_entries(tmp_path)
    for use in (PartFile(store, PART), store.lock("head"), closing(store.hold_folder())):
        with use:
            assert prune(entry) == Pruned(0, (store.key,))
        assert names(store) == before
    assert prune(entry).in_use == ()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_held_by_nobody_any_more_is_pruned(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    write(store)
    store.hold_folder()
    (entry,) = list_entries(tmp_path)
    assert prune(entry).in_use == ()


def test_a_pruning_that_the_disk_ends_leaves_what_tells_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path)
    for part in (PART, "head"):
        write(store, part)
    (entry,) = list_entries(tmp_path)

    original = entry.store.remove

    def fail(part: str) -> None:
        if part == "head":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        original(part)

    monkeypatch.setattr(entry.store, "remove", fail)
    with pytest.raises(ConfigurationError, match="Input/output error"):
        prune(entry)
    assert store.parts() == ["head"]
    assert store.description() is not None


def test_who_holds_a_folder_that_is_being_pruned_waits_and_has_a_new_one(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    write(store)
    pruning = store.hold_folder_alone()
    assert pruning is not None
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(store.hold_folder)
        shutil.rmtree(store.folder)
        pruning.close()
        with closing(held.result()):
            assert store.folder.is_dir()
            assert store.hold_folder_alone() is None


def test_pruning_leftovers_keeps_whole_parts(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    write(store)
    for name in ("head.weights.part", "block-0001.json.part", "block-0001.weights", "model.json.part"):
        (store.folder / name).write_bytes(bytes(10))
    (entry,) = list_entries(tmp_path)
    assert entry.leftover_bytes == 40
    assert prune_leftovers(entry).num_bytes == 40
    assert names(store) == {"model.json", "block-0000.json", "block-0000.weights"}


def test_another_version_is_known_and_can_be_pruned(tmp_path: Path) -> None:
    BlockStore(tmp_path, "old").describe(StoreDescription("owner/model", "r", "int8", 2, version=0))
    (tmp_path / "old" / "head.json").write_text("what only that version can read")
    (entry,) = list_entries(tmp_path)
    assert entry.is_other_version
    assert entry.damaged == ()
    prune(entry)
    assert list(tmp_path.iterdir()) == []


def test_damaged_parts_are_removed_unless_they_are_being_converted(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    for part in (PART, "head"):
        write(store, part)
    with store.lock("head"):
        assert remove_parts(store, [PART, "head"]) == ["head"]
    assert store.parts() == ["head"]


def test_a_part_that_is_streamed_stays(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    manifest = write(store)
    streamed = StreamedFile(PART, store.path(PART), is_direct=False)
    streamed.read(memoryview(bytearray(manifest.small_bytes)), 0)
    (entry,) = list_entries(tmp_path)
    assert prune(entry).in_use == (store.key,)
    streamed.close()
    assert prune(entry).in_use == ()

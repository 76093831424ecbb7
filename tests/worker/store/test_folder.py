from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from cluster.errors import ConfigurationError, StorageError
from cluster.model_spec import HubSource, Precision
from tests.worker.store.parts import PART, SOURCE, FailingDisk, make_store, names, write
from tests.worker.store.writing_process import half_written
from worker.store.folder import BlockStore, StoreDescription, describe_source, open_store, read_description
from worker.store.inventory import list_entries, prune_leftovers
from worker.store.key import store_key
from worker.store.verify import verify_part


def no_pause(_: float) -> None:
    return


def test_a_part_is_there_once_its_manifest_is(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    assert not store.has(PART)
    assert store.parts() == []
    write(store)
    assert store.has(PART)
    write(store, "head")
    assert store.parts() == [PART, "head"]
    store.manifest_path(PART).unlink()
    assert not store.has(PART)


def test_a_removed_part_is_gone(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    write(store)
    with store.lock(PART):
        store.remove(PART)
    assert names(store) == {"model.json"}
    with pytest.raises(StorageError, match="the manifest of block-0000"):
        store.manifest(PART)


def test_a_folder_says_what_it_was_converted_from(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    assert store.description() is None
    description = describe_source(SOURCE, Precision.INT8, num_blocks=2)
    store.describe(description)
    assert store.description() == description
    assert description == StoreDescription("owner/model", SOURCE.commit, "int8", 2, 1)


def test_equal_descriptions_have_equal_bytes_and_are_written_once(tmp_path: Path) -> None:
    stores = [make_store(tmp_path / name) for name in "ab"]
    for store in stores:
        store.describe(describe_source(SOURCE, Precision.INT8, 2))
    path = stores[0].folder / "model.json"
    assert path.read_bytes() == (stores[1].folder / "model.json").read_bytes()
    inode = path.stat().st_ino
    stores[0].describe(describe_source(SOURCE, Precision.INT8, 2))
    assert path.stat().st_ino == inode


@pytest.mark.parametrize("text", ["", "[]", '{"model": "m"}', '{"unknown": 1}'])
def test_a_damaged_description_says_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(text)
    assert read_description(tmp_path) is None


def test_what_a_later_version_says_besides_is_passed_over(tmp_path: Path) -> None:
    values = {"model": "m", "revision": "r", "precision": "int8", "num_blocks": 2, "version": 7, "layers": []}
    (tmp_path / "model.json").write_text(json.dumps(values))
    assert read_description(tmp_path) == StoreDescription("m", "r", "int8", 2, 7)


def test_a_description_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    store = make_store(tmp_path, disk=FailingDisk(fail_at=1))
    with pytest.raises(ConfigurationError, match=r"model\.json does not fit"):
        store.describe(describe_source(SOURCE, Precision.INT8, 2))
    assert names(store) == set()


def test_opening_a_store_notes_its_use(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    write(store)
    os.utime(store.folder / "model.json", (1.0, 1.0))
    assert open_store(tmp_path, SOURCE, Precision.INT8).has(PART)
    assert (store.folder / "model.json").stat().st_mtime > 1.0


def test_what_another_version_made_is_not_converted_again_unasked(tmp_path: Path) -> None:
    old = BlockStore(tmp_path, store_key(SOURCE, Precision.INT8, version=0))
    old.describe(StoreDescription("owner/model", SOURCE.commit, "int8", 2, version=0))
    with pytest.raises(ConfigurationError, match=r"owner/model in int8 as another version .* `cluster convert`"):
        open_store(tmp_path, SOURCE, Precision.INT8)
    open_store(tmp_path, SOURCE, Precision.NF4)
    open_store(tmp_path, HubSource(SOURCE.repo_id, "f" * 40, ""), Precision.INT8)
    write(make_store(tmp_path))  # as `cluster convert` does
    open_store(tmp_path, SOURCE, Precision.INT8)


def test_a_lock_excludes_other_threads_until_it_is_left(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    waits = []

    def other(entered: threading.Event, leave: threading.Event) -> None:
        with store.lock(PART):
            entered.set()
            leave.wait()

    entered, leave = threading.Event(), threading.Event()
    thread = threading.Thread(target=other, args=(entered, leave))
    thread.start()
    entered.wait()

    def on_wait() -> None:
        waits.append(True)
        leave.set()

    with store.lock(PART, on_wait, no_pause):
        thread.join()
    assert waits


def test_parts_have_locks_of_their_own(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    with store.lock(PART), store.lock("head"):
        assert store.try_lock(PART) is None


def test_a_wait_can_be_given_up(tmp_path: Path) -> None:
    store = make_store(tmp_path)

    def give_up() -> None:
        raise KeyboardInterrupt

    with store.lock(PART), pytest.raises(KeyboardInterrupt), store.lock(PART, give_up, no_pause):
        pytest.fail("locked twice")
    with store.lock(PART):
        pass


def test_a_lock_whose_file_was_removed_is_taken_anew(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    held = store.try_lock(PART)
    assert held is not None
    (store.folder / f"{PART}.lock").unlink()
    other = store.try_lock(PART)
    assert other is not None
    os.close(held)
    os.close(other)


def test_a_lock_that_cannot_be_made_says_where(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"cannot lock .*file.*--store-dir"):
        BlockStore(tmp_path / "file", "key").try_lock(PART)


def test_a_second_process_waits_and_finds_the_part(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    waits = []
    with half_written(tmp_path) as process:
        assert not store.has(PART)

        def on_wait() -> None:
            if not waits:
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
            waits.append(True)

        with store.lock(PART, on_wait):
            assert store.has(PART)
        assert process.wait() == 0
    assert waits
    verify_part(store, PART)


def test_a_killed_conversion_frees_its_lock_and_what_it_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    with half_written(tmp_path) as process:
        assert store.try_lock(PART) is None
        process.kill()
        process.wait()
    assert not store.has(PART)
    assert names(store) == {"block-0000.weights.part"}
    write(store)
    assert names(store) == {"model.json", "block-0000.weights", "block-0000.json"}
    verify_part(store, PART)


def test_what_a_killed_conversion_left_can_be_pruned_but_not_what_a_running_one_writes(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    with half_written(tmp_path) as process:
        (entry,) = list_entries(tmp_path)
        assert entry.leftover_bytes > 0
        assert prune_leftovers(entry).in_use == (f"{store.key}/{PART}",)
        assert names(store) == {"block-0000.weights.part"}
        process.kill()
        process.wait()
    assert prune_leftovers(entry).in_use == ()
    assert names(store) == set()


def test_a_store_that_may_only_be_read_needs_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path)
    write(store)

    def refuse(_: str) -> None:
        pytest.fail("locked")

    monkeypatch.setattr(store, "try_lock", refuse)
    store.describe(describe_source(SOURCE, Precision.INT8, num_blocks=2))
    verify_part(store, PART)


@pytest.mark.parametrize("file", ["block-0000.weights", "block-0000.json"])
@pytest.mark.parametrize("size", [None, 0, 100])
def test_a_part_that_lost_bytes_is_not_there(file: str, size: int | None, tmp_path: Path) -> None:
    store = make_store(tmp_path)
    write(store)
    if size is None:
        (store.folder / file).unlink()
    else:
        os.truncate(store.folder / file, size)
    assert not store.has(PART)


def test_what_another_version_made_is_refused_beside_an_empty_folder_too(tmp_path: Path) -> None:
    BlockStore(tmp_path, "old").describe(StoreDescription("owner/model", SOURCE.commit, "int8", 2, version=0))
    make_store(tmp_path).hold_folder().close()
    with pytest.raises(ConfigurationError, match="another version"):
        open_store(tmp_path, SOURCE, Precision.INT8)

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.worker.store.parts import PART, flip_bit, make_store, write
from worker.store.folder import BlockStore, StoreDescription
from worker.store.reader import PartFile

Run = Callable[..., Any]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BlockStore:
    """A store with one block of a model of two, where the command looks for it."""
    monkeypatch.setenv("SPANWISE_STORE_DIR", str(tmp_path / "store"))
    made = make_store(tmp_path / "store")
    write(made)
    return made


def test_list_shows_model_parts_and_bytes(run: Run, store: BlockStore) -> None:
    result = run("store", "list")
    assert result.exit_code == 0
    for word in (store.key, "owner/model", "int8", "1 of 4", "KiB", str(store.root)):
        assert word in result.output


def test_list_tells_damaged_parts_from_whole_ones(run: Run, store: BlockStore) -> None:
    write(store, "head")
    store.path("head").unlink()
    assert "1 of 4, 1 damaged" in run("store", "list").output
    (entry,) = json.loads(run("store", "list", "--json").output)
    assert entry["damaged"] == ["head"]


def test_list_of_an_empty_store_says_where(run: Run, tmp_path: Path) -> None:
    result = run("store", "list", "--store-dir", tmp_path / "none")
    assert result.exit_code == 0
    assert result.output == f"nothing is converted in {tmp_path / 'none'}\n"


def test_list_prints_json_for_programs(run: Run, store: BlockStore) -> None:
    (entry,) = json.loads(run("store", "list", "--json").output)
    assert entry["key"] == store.key
    assert entry["parts"] == [PART]
    assert entry["missing"] == ["embedding", "block-0001", "head"]
    assert entry["description"]["precision"] == "int8"


def test_verify_of_a_whole_store_is_quiet(run: Run, store: BlockStore) -> None:
    result = run("store", "verify")
    assert result.exit_code == 0
    assert result.output == f"{store.key}: 1 part is whole\n"


def test_verify_names_damage_and_leaves_it_unless_told(run: Run, store: BlockStore) -> None:
    flip_bit(store.path(PART), store.manifest(PART).weights[0].pieces[0].tensors["weight"].offset)
    result = run("store", "verify", "owner/model")
    assert result.exit_code == 1
    assert f"{store.key}: damaged: block-0000: tensor attention.q" in result.output
    assert result.output.count("verify --remove") == 1
    assert store.has(PART)
    result = run("store", "verify", "--remove")
    assert result.exit_code == 0
    assert "removed: block-0000" in result.output
    assert "verify --remove" not in result.output
    assert not store.has(PART)
    assert run("store", "verify").exit_code == 0


def test_verify_fails_where_a_damaged_part_cannot_be_removed_now(run: Run, store: BlockStore) -> None:
    store.path(PART).unlink()
    with store.lock(PART):
        result = run("store", "verify", "--remove")
    assert result.exit_code == 1
    assert f"{store.key}: damaged: block-0000" in result.output


def test_verify_passes_over_other_versions(run: Run, store: BlockStore) -> None:
    BlockStore(store.root, "old").describe(StoreDescription("m", "r", "int8", 2, version=0))
    result = run("store", "verify")
    assert result.exit_code == 0
    assert "old: not checked" in result.output


def test_prune_shows_and_asks_first(run: Run, store: BlockStore) -> None:
    result = run("store", "prune", "owner/model", input="n\n")
    assert store.key in result.output
    assert store.has(PART)
    result = run("store", "prune", "owner/model", input="y\n")
    assert result.exit_code == 0
    assert "removed" in result.output
    assert not store.folder.exists()


def test_prune_of_older_versions_keeps_this_one(run: Run, store: BlockStore) -> None:
    old = BlockStore(store.root, "old")
    old.describe(StoreDescription("m", "r", "int8", 2, version=0))
    assert run("store", "prune", "--older-version", "--yes").exit_code == 0
    assert not old.folder.exists()
    assert store.has(PART)


def test_prune_of_leftovers_keeps_parts(run: Run, store: BlockStore) -> None:
    leftover = store.folder / "head.weights.part"
    leftover.write_bytes(bytes(2048))
    result = run("store", "prune", "--partial", "--yes")
    assert f"{store.key}: 2.0 KiB of unfinished conversions" in result.output
    assert not leftover.exists()
    assert store.has(PART)
    assert "nothing to remove" in run("store", "prune", "--partial").output


def test_prune_of_leftovers_removes_empty_ones_too(run: Run, store: BlockStore) -> None:
    leftover = store.folder / "head.weights.part"
    leftover.touch()
    assert "0 B unfinished" in run("store", "list").output
    assert run("store", "prune", "--partial", "--yes").exit_code == 0
    assert not leftover.exists()


@pytest.mark.parametrize("command", ["list", "verify", "prune"])
def test_a_file_is_no_store(run: Run, tmp_path: Path, command: str) -> None:
    (tmp_path / "file").touch()
    result = run("store", command, "--store-dir", tmp_path / "file")
    assert result.exit_code == 2
    assert "is a file" in result.stderr


def test_an_empty_name_means_no_model(run: Run, store: BlockStore) -> None:
    assert run("store", "prune", "", "--yes").exit_code == 1
    assert store.has(PART)


def test_prune_leaves_what_is_in_use_and_says_so(run: Run, store: BlockStore) -> None:
    with PartFile(store, PART):
        result = run("store", "prune", "--all", "--yes")
    assert f"{store.key} is in use by another process and stays" in result.output
    assert store.has(PART)


@pytest.mark.parametrize("arguments", [(), ("name", "--all"), ("--partial", "--older-version")])
def test_prune_wants_to_be_told_what(run: Run, arguments: tuple[str, ...]) -> None:
    result = run("store", "prune", *arguments)
    assert result.exit_code == 2
    assert "--older-version" in result.stderr


def test_an_unknown_name_is_told_in_a_sentence(run: Run, store: BlockStore) -> None:
    result = run("store", "verify", "bloom")
    assert result.exit_code == 1
    assert f"nothing in the block store in {store.root} is called 'bloom'" in result.stderr

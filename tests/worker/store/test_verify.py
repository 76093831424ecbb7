from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import StorageError
from cluster.model_spec import Precision
from tests.worker.store.parts import PART, flip_bit, make_store, write
from worker.store.manifest import to_json
from worker.store.part_bytes import tensors_of
from worker.store.verify import verify_part, verify_parts


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.NF4])
def test_a_whole_part_passes_and_every_byte_is_counted(precision: Precision, tmp_path: Path) -> None:
    store = make_store(tmp_path, precision)
    manifest = write(store, precision=precision)
    counted: list[int] = []
    verify_part(store, PART, counted.append)
    assert sum(counted) == sum(place.num_bytes for _, place in tensors_of(manifest))


def test_each_damaged_part_is_named_in_order(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    parts = [f"block-{number:04}" for number in range(6)]
    for part in parts:
        manifest = write(store, part)
    flip_bit(store.path(parts[4]), manifest.weights[1].pieces[0].tensors["weight"].offset)
    flip_bit(store.manifest_path(parts[3]), 100)
    store.path(parts[2]).unlink()
    with store.path(parts[1]).open("r+b") as file:
        file.truncate(5)
    damages = verify_parts(store, parts, lambda _: None)
    assert [damage.part for damage in damages] == parts[1:5]
    for damage, word in zip(damages, ("bytes instead of", "cannot be read", "", "attention.o"), strict=True):
        assert damage.part in damage.message
        assert word in damage.message


def test_a_part_of_another_version_is_told_and_the_others_are_verified(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    parts = ["block-0000", "block-0001", "head"]
    manifests = [write(store, part) for part in parts]
    store.manifest_path("block-0001").write_bytes(to_json(replace(manifests[1], version=7)))
    flip_bit(store.path("head"), manifests[2].weights[0].pieces[0].tensors["weight"].offset)
    other, damaged = verify_parts(store, parts, lambda _: None)
    assert (other.part, damaged.part) == ("block-0001", "head")
    assert "another version" in other.message


def test_padding_is_no_damage(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    manifest = write(store)
    flip_bit(store.path(PART), manifest.file_bytes - 1)
    verify_part(store, PART)


def test_a_missing_part_is_damage(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="block-0000"):
        verify_part(make_store(tmp_path), PART)

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.errors import ConfigurationError, StorageError
from cluster.model_spec import Precision
from tests.worker.store.parts import PART, flip_bit, make_small, make_store, make_weights, read_small, write
from worker.store.manifest import to_json
from worker.store.part_bytes import PartBytes, tensors_of
from worker.store.reader import PartFile
from worker.store.writer import join_pieces
from worker.stored_weight import hold


def read_everything(part: PartFile) -> None:
    read_small(part)
    for place in part.manifest.weights:
        hold(part.open_weight(place))


@pytest.mark.parametrize("precision", list(Precision))
def test_what_is_read_is_what_was_written(precision: Precision, tmp_path: Path) -> None:
    store = make_store(tmp_path, precision)
    write(store, precision=precision)
    with PartFile(store, PART) as part:
        small = read_small(part)
        assert all(torch.equal(small[name], tensor) for name, tensor in make_small().items())
        for place, weight in zip(part.manifest.weights, make_weights(precision), strict=True):
            read = hold(part.open_weight(place))
            assert (read.name, read.kind, read.shape) == (weight.name, weight.kind, weight.shape)
            written, found = join_pieces(weight), join_pieces(read)
            assert all(torch.equal(found[role], tensor) for role, tensor in written.items())
            assert all(torch.equal(read.small[role], tensor) for role, tensor in weight.small.items())


def test_pieces_are_read_one_at_a_time(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    write(store)
    with PartFile(store, PART) as part:
        pieces = part.open_weight(part.manifest.weight("attention.q")).pieces()
        next(pieces)
        with store.path(PART).open("r+b") as file:
            file.truncate(0)
        with pytest.raises(StorageError, match=PART):
            next(pieces)


def test_single_rows_are_read_from_any_piece(tmp_path: Path) -> None:
    store = make_store(tmp_path, Precision.BF16)
    write(store, precision=Precision.BF16)
    whole = join_pieces(make_weights(Precision.BF16)[0])["weight"]
    with PartFile(store, PART) as part:
        rows = part.read_rows(part.manifest.weight("attention.q"), [199, 0, 64, 63, 0])
    assert torch.equal(rows, whole[[199, 0, 64, 63, 0]])


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.NF4])
def test_a_flipped_bit_in_any_tensor_is_found_and_named(precision: Precision, tmp_path: Path) -> None:
    store = make_store(tmp_path, precision)
    manifest = write(store, precision=precision)
    for name, place in tensors_of(manifest):
        offset = place.offset + place.num_bytes // 2
        flip_bit(store.path(PART), offset)
        with PartFile(store, PART) as part, pytest.raises(StorageError) as caught:
            read_everything(part)
        assert caught.value.message.startswith(f"block-0000: tensor {name} in {store.path(PART)} is damaged")
        flip_bit(store.path(PART), offset)


def test_a_file_cut_short_is_found_when_it_is_opened(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    manifest = write(store)
    with store.path(PART).open("r+b") as file:
        file.truncate(manifest.file_bytes - 1)
    with pytest.raises(StorageError, match=r"block-0000: .* bytes instead of"):
        PartFile(store, PART)


def test_a_file_cut_short_while_it_is_open_never_gives_stale_data(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    manifest = write(store)
    with PartFile(store, PART) as part:
        with store.path(PART).open("r+b") as file:
            file.truncate(manifest.small_bytes)
        with pytest.raises(StorageError, match=r"block-0000: tensor attention\.q .* the file ends at byte"):
            hold(part.open_weight(manifest.weights[0]))
        with pytest.raises(StorageError, match=r"tensor attention\.q .* the file ends"):
            part.read_rows(manifest.weights[0], [5])


def test_a_vanished_file_is_named(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    write(store)
    store.path(PART).unlink()
    with pytest.raises(StorageError, match=rf"block-0000: {store.path(PART)} cannot be read \(No such file"):
        PartFile(store, PART)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="the manifest of block-0000"):
        PartFile(make_store(tmp_path), PART)


def test_another_version_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.manifest_path(PART).write_bytes(to_json(replace(write(store), version=2)))
    with pytest.raises(ConfigurationError, match=r"block-0000\.json was made by another version"):
        PartFile(store, PART)


def test_a_renamed_part_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    write(store)
    for path in (store.path(PART), store.manifest_path(PART)):
        path.rename(path.with_name(path.name.replace("0000", "0001")))
    with pytest.raises(StorageError, match="is the manifest of block-0000, not of block-0001"):
        PartBytes(store, "block-0001")


def test_closing_gives_the_descriptor_back(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    write(store)
    with PartFile(store, PART) as part:
        descriptor = part.fileno()
        assert Path(f"/proc/self/fd/{descriptor}").exists()
    assert not Path(f"/proc/self/fd/{descriptor}").exists()

from __future__ import annotations

import errno
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cluster.errors import ConfigurationError, InvariantError
from cluster.model_spec import Precision
from tests.worker.store.parts import (
    PART,
    SHAPES,
    FailingDisk,
    make_plan,
    make_small,
    make_store,
    make_weights,
    names,
    write,
)
from worker.quantization.encode import encode
from worker.store.folder import BlockStore
from worker.store.verify import verify_part
from worker.store.writer import join_pieces, write_part
from worker.stored_weight import MemoryWeight, Piece


def contents(store: BlockStore) -> dict[str, bytes]:
    return {name: (store.folder / name).read_bytes() for name in names(store)}


@pytest.mark.parametrize("precision", list(Precision))
def test_two_conversions_give_the_same_bytes(precision: Precision, tmp_path: Path) -> None:
    stores = [make_store(tmp_path / name, precision) for name in "ab"]
    for store, num_threads in zip(stores, (1, 2), strict=True):
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        write(store, precision=precision)
        torch.set_num_threads(before)
    assert contents(stores[0]) == contents(stores[1])
    assert names(stores[0]) == {"model.json", "block-0000.json", "block-0000.weights"}


def test_the_file_is_as_long_as_planned_and_bytes_are_counted(tmp_path: Path) -> None:
    store, counted = make_store(tmp_path), []
    with store.lock(PART):
        manifest = write_part(
            store, make_plan(Precision.INT8), make_small(), make_weights(Precision.INT8), counted.append
        )
    assert store.path(PART).stat().st_size == manifest.file_bytes
    large = 200 * 128 + 64 * 72 + 77 * 100
    assert sum(counted) == large + 4 * (200 + 64 + 77) + 4 * 13 + 2 * 5


def test_one_weight_is_in_memory_at_a_time(tmp_path: Path) -> None:
    store, held = make_store(tmp_path), []

    def tracked(weight: MemoryWeight) -> MemoryWeight:
        held.append(weakref.ref(weight.held[0].tensors["weight"]))
        return weight

    def lazily() -> Iterator[MemoryWeight]:
        for name, shape in SHAPES.items():
            assert [reference() for reference in held if reference() is not None] == []
            yield tracked(encode(name, torch.ones(shape), Precision.INT8))

    with store.lock(PART):
        write_part(store, make_plan(Precision.INT8), make_small(), lazily())
    assert len(held) == 3


def test_more_or_fewer_weights_than_planned_are_our_bug(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    weights = make_weights(Precision.INT8)
    with store.lock(PART):
        for wrong in ([*weights, weights[0]], weights[:2]):
            with pytest.raises(InvariantError, match="plan"):
                write_part(store, make_plan(Precision.INT8), make_small(), wrong)
    assert names(store) == set()


def test_a_weight_of_several_pieces_gives_the_same_bytes(tmp_path: Path) -> None:
    whole = make_weights(Precision.INT8)

    def cut(weight: MemoryWeight) -> MemoryWeight:
        codes = weight.held[0].tensors["weight"]
        pieces = (Piece(0, 3, {"weight": codes[:3]}), Piece(3, len(codes) - 3, {"weight": codes[3:]}))
        return MemoryWeight(weight.name, weight.kind, weight.shape, weight.small, pieces)

    stores = [make_store(tmp_path / name) for name in "ab"]
    for store, weights in zip(stores, (whole, [cut(weight) for weight in whole]), strict=True):
        with store.lock(PART):
            write_part(store, make_plan(Precision.INT8), make_small(), weights)
    assert contents(stores[0]) == contents(stores[1])
    assert torch.equal(join_pieces(cut(whole[0]))["weight"], whole[0].held[0].tensors["weight"])


def num_calls(tmp_path: Path) -> int:
    disk = FailingDisk(fail_at=10**9)
    write(make_store(tmp_path / "counted", disk=disk))
    return disk.num_calls


def test_a_full_disk_leaves_nothing_behind_whenever_it_fills(tmp_path: Path) -> None:
    for fail_at in range(num_calls(tmp_path)):
        store = make_store(tmp_path / str(fail_at), disk=FailingDisk(fail_at))
        with pytest.raises(ConfigurationError, match="the disk is full") as caught:
            write(store)
        assert str(store.folder) in caught.value.message
        assert "--store-dir" in caught.value.message
        assert names(store) <= {"model.json"}
        assert not store.has(PART)
        again = make_store(tmp_path / str(fail_at))
        write(again)
        verify_part(again, PART)


def test_a_full_disk_names_part_and_bytes(tmp_path: Path) -> None:
    store = make_store(tmp_path, disk=FailingDisk(fail_at=6))
    with pytest.raises(ConfigurationError, match=rf"block-0000 \({make_plan(Precision.INT8).file_bytes:,} bytes\)"):
        write(store)


def test_an_older_part_stays_when_the_disk_fills_while_it_is_written_again(tmp_path: Path) -> None:
    write(make_store(tmp_path))
    before = contents(make_store(tmp_path))
    total = num_calls(tmp_path)
    for fail_at in range(total):
        disk = FailingDisk(fail_at)
        try:
            write(make_store(tmp_path, disk=disk))
        except ConfigurationError:
            assert contents(make_store(tmp_path)) == before
            verify_part(make_store(tmp_path), PART)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EIO, errno.EDQUOT])
def test_other_failures_of_the_disk_are_told_with_a_way_out(number: int, tmp_path: Path) -> None:
    store = make_store(tmp_path, disk=FailingDisk(6, number))
    with pytest.raises(ConfigurationError, match="--store-dir"):
        write(store)
    assert names(store) == {"model.json"}


def test_a_failure_of_the_source_leaves_nothing_behind(tmp_path: Path) -> None:
    store = make_store(tmp_path)

    def failing() -> Iterator[MemoryWeight]:
        yield make_weights(Precision.INT8)[0]
        raise ValueError("the checkpoint is damaged")

    with pytest.raises(ValueError, match="checkpoint"), store.lock(PART):
        write_part(store, make_plan(Precision.INT8), make_small(), failing())
    assert names(store) == set()


def test_weights_in_another_order_than_planned_are_our_bug(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    with store.lock(PART), pytest.raises(InvariantError, match=r"mlp\.down was to be written where .* attention\.q"):
        write_part(store, make_plan(Precision.INT8), make_small(), make_weights(Precision.INT8)[::-1])

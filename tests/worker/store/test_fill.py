"""Missing parts are made once, resumed, shared between processes and stages; downloads are discarded when asked."""

from __future__ import annotations

import contextlib
import errno
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cluster.errors import ConfigurationError
from cluster.load_order import LoadProgress, StoreOptions
from cluster.model_spec import SUPPORTED_ARCHITECTURES, Precision
from tests.checkpoints import make_checkpoint, write_weights
from tests.worker.store.converted import fill, parts_of, start_process, stored_order
from tests.worker.store.parts import FailingDisk, read_small
from worker.architectures import open_architecture
from worker.checkpoint_weights import CheckpointWeights, needed_names
from worker.quantization.encode import encode
from worker.store.convert import TABLE, stored_layers
from worker.store.copied import store_of
from worker.store.fill import StoreFiller
from worker.store.folder import BlockStore
from worker.store.key import HEAD, all_parts
from worker.store.reader import PartFile
from worker.stored_weight import hold
from worker.weights import CheckpointSource


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", "llama", num_shards=3)


def digest(store: BlockStore) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.folder.iterdir() if path.suffix in (".json", ".weights")}


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.NF4, Precision.BF16])
@pytest.mark.parametrize("architecture", SUPPORTED_ARCHITECTURES)
def test_stored_parts_are_the_checkpoints_tensors_encoded(
    tmp_path: Path, architecture: str, precision: Precision
) -> None:
    order = stored_order(make_checkpoint(tmp_path / "model", architecture), tmp_path / "store", precision=precision)
    fill(order)
    opened = open_architecture(order.config)
    parts = parts_of(order)
    checkpoint = CheckpointSource(order).fetch(needed_names(opened, parts).__contains__, lambda _: None)
    weights = CheckpointWeights(order, opened, checkpoint)
    for part in parts:
        kind = precision.of_head if part.name == HEAD else precision
        with PartFile(store_of(order), part.name) as file:
            layers = stored_layers(part)
            assert [w.name for w in file.manifest.weights if w.name != TABLE] == [layer.name for layer in layers]
            for layer in layers:
                found = hold(file.open_weight(file.manifest.weight(layer.name)))
                shape = layer.shape[::-1] if layer.is_transposed else layer.shape
                original = weights.tensor(f"{part.key}{layer.name}.weight", shape)
                expected = encode(layer.name, original.t() if layer.is_transposed else original, kind)
                assert_equal_weights(found, expected)
            for name, small in read_small(file).items():
                original = weights.tensor(part.key + name, tuple(small.shape))
                rounded = original if precision.is_quantized else original.bfloat16()
                assert torch.equal(small, rounded)


def assert_equal_weights(found: object, expected: object) -> None:
    for weight in (found, expected):
        assert len(weight.held) == 1  # type: ignore[attr-defined]
    ours, theirs = found.held[0].tensors, expected.held[0].tensors  # type: ignore[attr-defined]
    assert all(torch.equal(ours[role], theirs[role]) for role in theirs)
    small = expected.small  # type: ignore[attr-defined]
    assert all(torch.equal(found.small[role], small[role]) for role in small)  # type: ignore[attr-defined]


def test_experts_are_stored_one_after_the_other_in_order_of_use(tmp_path: Path) -> None:
    order = stored_order(make_checkpoint(tmp_path / "model", "mixtral"), tmp_path / "store")
    fill(order)
    manifest = store_of(order).manifest("block-0000")
    names = [weight.name for weight in manifest.weights]
    assert names[:4] == [f"self_attn.{name}_proj" for name in "qkvo"]
    assert names[4:] == [f"mlp.experts.{expert}.{name}" for expert in range(5) for name in ("w1", "w3", "w2")]
    experts = [manifest.slices[weight.pieces[0].slice_index].expert for weight in manifest.weights]
    assert experts == [None] * 4 + [expert for expert in range(5) for _ in range(3)]
    assert "mlp.gate.weight" in manifest.small


def test_one_stage_and_three_share_a_store(folder: Path, tmp_path: Path) -> None:
    for stage in range(3):
        fill(stored_order(folder, tmp_path / "three", stage, 3))
    fill(stored_order(folder, tmp_path / "one"))
    one, three = (store_of(stored_order(folder, tmp_path / name)) for name in ("one", "three"))
    assert digest(one) == digest(three)
    assert set(one.parts()) == set(all_parts(3))
    before = digest(one)
    assert fill(stored_order(folder, tmp_path / "one", 1, 3)) == []
    assert digest(one) == before


def test_a_conversion_that_the_disk_ends_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    order = stored_order(folder, tmp_path / "store")
    done: list[int] = []
    for _ in range(100):
        store = BlockStore(store_of(order).root, store_of(order).key, FailingDisk(45, errno.ENOSPC))
        with contextlib.suppress(ConfigurationError):
            fill(order, store)
        done.append(len([part for part in all_parts(3) if store.has(part)]))
        if done[-1] == 5:
            break
    assert done == sorted(done)
    assert len(set(done)) > 2
    fill(stored_order(folder, tmp_path / "other"))
    assert digest(store_of(order)) == digest(store_of(stored_order(folder, tmp_path / "other")))


def test_two_processes_make_each_part_once(folder: Path, tmp_path: Path) -> None:
    processes = [start_process(folder, tmp_path / "store") for _ in range(2)]
    made: list[str] = []
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        made += out.split()
    assert sorted(made) == sorted(all_parts(3))


def test_several_parts_at_once_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    fill(stored_order(folder, tmp_path / "one"))
    reports = fill(stored_order(folder, tmp_path / "many"), num_at_once=3)
    one, many = (store_of(stored_order(folder, tmp_path / name)) for name in ("one", "many"))
    assert digest(one) == digest(many)
    assert reports[-1].bytes_done == reports[-1].bytes_total


def test_a_failure_among_several_parts_ends_the_others_and_is_told(folder: Path, tmp_path: Path) -> None:
    order = stored_order(folder, tmp_path / "store")
    store = BlockStore(store_of(order).root, store_of(order).key, FailingDisk(30))
    with pytest.raises(ConfigurationError, match="disk is full"):
        fill(order, store, num_at_once=3)
    fill(order)
    assert set(store.parts()) == set(all_parts(3))


def test_what_is_reported_grows_to_the_announced_total(folder: Path, tmp_path: Path) -> None:
    reports = [report for report in fill(stored_order(folder, tmp_path / "store")) if report.phase == "converting"]
    assert [r.bytes_done for r in reports] == sorted(r.bytes_done for r in reports)
    assert {r.bytes_total for r in reports} == {reports[-1].bytes_done}


def test_a_full_store_needs_no_source(folder: Path, tmp_path: Path) -> None:
    order = stored_order(folder, tmp_path / "store")
    fill(order)
    store, before = store_of(order), digest(store_of(order))

    def refuse() -> CheckpointSource:
        raise AssertionError("the source was opened")

    fill(order, store, source=refuse)
    assert digest(store) == before


def test_parts_that_lost_bytes_are_made_again(folder: Path, tmp_path: Path) -> None:
    order = stored_order(folder, tmp_path / "store")
    fill(order)
    store, before = store_of(order), digest(store_of(order))
    os.truncate(store.path("block-0000"), 100)
    store.path("block-0001").unlink()
    os.truncate(store.manifest_path("head"), 0)
    fill(order)
    assert digest(store) == before


def test_room_for_all_missing_parts_is_asked_first(folder: Path, tmp_path: Path) -> None:
    options = StoreOptions(store_folder=str(tmp_path / "store"), quota_bytes=1000)
    order = stored_order(folder, tmp_path, store=options)
    with pytest.raises(ConfigurationError, match="quota"):
        fill(order)
    assert store_of(order).parts() == []


def test_two_workers_of_a_store_together_keep_to_its_quota(folder: Path, tmp_path: Path) -> None:
    reports = fill(stored_order(folder, tmp_path / "other", 0, 2))
    options = StoreOptions(store_folder=str(tmp_path / "store"), quota_bytes=reports[0].bytes_total * 11 // 10)
    first, second = (stored_order(folder, tmp_path, stage, 2, store=options) for stage in range(2))
    refusals: list[str] = []

    def try_the_other(_: LoadProgress) -> None:
        with pytest.raises(ConfigurationError) as caught:
            fill(second)
        refusals.append(caught.value.message)

    source = partial(CheckpointSource, first)
    StoreFiller(first, open_architecture(first.config), store_of(first), source, try_the_other).fill(parts_of(first))
    assert "other workers are about to write" in refusals[0]
    assert store_of(first).parts() == [part.name for part in parts_of(first)]


def test_a_shard_that_is_newer_than_what_was_made_of_it_is_named(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    order = stored_order(folder, tmp_path / "store")
    fill(order)
    fill(order)
    assert caplog.messages == []
    shard = folder / order.weight_files[1].name
    later = store_of(order).manifest_path(HEAD).stat().st_mtime + 10
    os.utime(shard, (later, later))
    fill(order)
    (message,) = caplog.messages
    assert f"{shard} is newer than" in message
    assert f"cluster store prune --store-dir {tmp_path / 'store'} {store_of(order).key}" in message


def test_values_beyond_fp16_are_named(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    write_weights(folder, tensors)
    with pytest.raises(ConfigurationError, match=r"layers\.1\.mlp\.up_proj\.weight.*--precision bf16"):
        fill(stored_order(folder, tmp_path / "store", precision=Precision.FP16))
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    write_weights(folder, tensors)
    with pytest.raises(ConfigurationError, match=r"layers\.1\.mlp\.up_proj\.weight.*not numbers"):
        fill(stored_order(folder, tmp_path / "store"))

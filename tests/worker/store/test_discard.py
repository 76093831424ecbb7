"""What was downloaded is deleted once it is converted: not before, not under another worker's feet, never what a user
put there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest

from cluster.errors import ConfigurationError
from cluster.hub.download import HubAccess
from cluster.hub.resolve import resolve_with
from cluster.load_order import LoadOrder, StoreOptions
from cluster.testing.hub import LocalHub
from tests.checkpoints import make_checkpoint
from tests.worker.pipeline_driver import load_span
from tests.worker.store.converted import fill, stored_order
from tests.worker.test_span_download import FolderReader
from worker.store.copied import store_of
from worker.store.key import all_parts
from worker.weights import CheckpointSource

REPO = "owner/model"
NUM_SHARDS = 3
NOTES_BYTES = 5000


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    huggingface_hub.close_session()
    make_checkpoint(tmp_path / "hub" / REPO, "llama", num_shards=NUM_SHARDS)
    with LocalHub(tmp_path / "hub") as running:
        yield running
    huggingface_hub.close_session()


def hub_order(hub: LocalHub, tmp_path: Path, stage: int = 0, num_stages: int = 1, **options: bool) -> LoadOrder:
    """Return an order to convert a repository, downloads going to `tmp_path / "cache"`."""
    spec = resolve_with(REPO, "main", HubAccess(hub.url, None, tmp_path / "coordinator"))
    store = StoreOptions(str(tmp_path / "store"), str(tmp_path / "cache"), **options)
    order = stored_order(hub.root / REPO, tmp_path, stage, num_stages, store=store)
    hub.requests.clear()
    return replace(order, source=spec.source, weight_files=spec.weight_files, weight_map=spec.weight_map)


def cached_bytes(tmp_path: Path) -> int:
    """Return the bytes of shards; what the hub's client and we note about them is smaller."""
    sizes = (path.lstat().st_size for path in (tmp_path / "cache").rglob("*"))
    return sum(size for size in sizes if size > NOTES_BYTES)


def test_a_download_stays_unless_discarding_is_asked_for(hub: LocalHub, tmp_path: Path) -> None:
    fill(hub_order(hub, tmp_path))
    assert cached_bytes(tmp_path) > 100_000


def test_every_shard_goes_once_it_is_converted_and_the_store_serves_alone(hub: LocalHub, tmp_path: Path) -> None:
    order = hub_order(hub, tmp_path, is_source_discarded=True)
    largest, original = 0, CheckpointSource.fetch

    def fetch(source: CheckpointSource, *arguments: object) -> object:
        nonlocal largest
        opened = original(source, *arguments)  # type: ignore[arg-type]
        largest = max(largest, cached_bytes(tmp_path))
        return opened

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointSource, "fetch", fetch)
        fill(order)
    assert cached_bytes(tmp_path) == 0
    assert 0 < largest < sum(file.size_bytes for file in order.weight_files) * 2
    assert len([request for request in hub.requests if ".safetensors" in request.path]) > 0
    hub.requests.clear()
    assert load_span(order).executor.num_blocks == 3
    assert hub.requests == []


def test_what_an_earlier_run_downloaded_goes_though_no_part_is_missing(hub: LocalHub, tmp_path: Path) -> None:
    fill(hub_order(hub, tmp_path))
    assert cached_bytes(tmp_path) > 100_000
    fill(hub_order(hub, tmp_path, is_source_discarded=True))
    assert cached_bytes(tmp_path) == 0
    assert hub.requests == []


def test_a_disk_need_not_hold_all_shards_at_once_that_are_discarded(hub: LocalHub, tmp_path: Path) -> None:
    reports = fill(stored_order(hub.root / REPO, tmp_path / "other"))
    converted_bytes = next(report.bytes_total for report in reports if report.phase == "converting")

    def fill_disk(free: int, *, is_source_discarded: bool) -> None:
        order = hub_order(hub, tmp_path, is_source_discarded=is_source_discarded)
        fill(order, measure=lambda _: converted_bytes + free)

    sizes = [file.size_bytes for file in hub_order(hub, tmp_path).weight_files]
    with pytest.raises(ConfigurationError, match="do not fit"):
        fill_disk(sum(sizes) - 1, is_source_discarded=False)
    with pytest.raises(ConfigurationError, match="do not fit"):
        fill_disk(max(sizes) - 1, is_source_discarded=True)
    fill_disk(sum(sizes) - 1, is_source_discarded=True)


def test_a_shard_that_another_worker_needs_stays_until_that_one_is_done(hub: LocalHub, tmp_path: Path) -> None:
    first, second = (hub_order(hub, tmp_path, stage, 2, is_source_discarded=True) for stage in range(2))
    other = CheckpointSource(second)
    held = other.hold([file.name for file in second.weight_files])
    fill(first)
    assert cached_bytes(tmp_path) > 0
    held.close()
    fill(second)
    assert set(store_of(second).parts()) == set(all_parts(3))


def test_files_of_a_users_folder_stay(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "llama", num_shards=NUM_SHARDS)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    store = StoreOptions(str(tmp_path / "store"), is_source_discarded=True)
    fill(stored_order(folder, tmp_path, store=store))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_our_copy_of_a_folder_elsewhere_goes_with_what_is_known_about_it(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "head", "llama", num_shards=NUM_SHARDS)
    store = StoreOptions(str(tmp_path / "store"), str(tmp_path / "cache"), is_source_discarded=True)
    order = replace(stored_order(folder, tmp_path, store=store), checkpoint_service="head:7000")
    folder.rename(tmp_path / "moved")
    reader = FolderReader(tmp_path / "moved")
    fill(order, source=lambda: CheckpointSource(order, connect=lambda _: reader))
    assert cached_bytes(tmp_path) == 0
    assert set(store_of(order).parts()) == set(all_parts(3))


def test_a_span_fetches_the_bytes_of_its_missing_parts_only(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "head", "llama")
    store = StoreOptions(str(tmp_path / "store"), str(tmp_path / "cache"))
    order = replace(stored_order(folder, tmp_path, 1, 3, store=store), checkpoint_service="head:7000")
    folder.rename(tmp_path / "moved")
    reader = FolderReader(tmp_path / "moved")
    fill(order, source=lambda: CheckpointSource(order, connect=lambda _: reader))
    whole = (tmp_path / "moved" / "model.safetensors").stat().st_size
    assert reader.num_bytes("model.safetensors") < whole / 2


def test_a_missing_source_matters_only_when_a_part_is_missing(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "llama")
    order = stored_order(folder, tmp_path / "store")
    fill(order)
    folder.rename(tmp_path / "moved")
    assert load_span(order).executor.num_blocks == 3
    store = store_of(order)
    with store.lock("block-0001"):
        store.remove("block-0001")
    with pytest.raises(ConfigurationError, match="copy the folder here"):
        load_span(order)

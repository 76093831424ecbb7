from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch

from cluster.errors import ConfigurationError, PermissionDeniedError
from cluster.hub.download import HubAccess
from cluster.hub.resolve import resolve_with
from cluster.load_order import LoadOrder, LoadProgress, StoreOptions
from cluster.testing.hub import LocalHub
from tests.small_checkpoints import order_for, tensors_of_blocks, truncate, write_sharded, write_single
from worker.weights import Checkpoint, fetch_checkpoint

REPO = "owner/model"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    huggingface_hub.close_session()
    write_sharded(tmp_path / "hub" / REPO)
    with LocalHub(tmp_path / "hub", token="hf_good") as running:
        yield running
    huggingface_hub.close_session()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """The worker's cache: another one than the coordinator's, as on another machine."""
    return tmp_path / "worker-cache"


def resolve_order(hub: LocalHub, tmp_path: Path, token: str = "hf_good") -> LoadOrder:
    spec = resolve_with(REPO, "main", HubAccess(hub.url, token, tmp_path / "coordinator-cache"))
    hub.requests.clear()
    return order_for(spec, token=token)


def fetch(
    order: LoadOrder, cache: Path, is_needed: Callable[[str], bool], reports: list[LoadProgress] | None = None
) -> Checkpoint:
    reports = [] if reports is None else reports
    return fetch_checkpoint(order, is_needed, reports.append, cache_folder=cache)


def is_of_last_blocks(name: str) -> bool:
    return name.startswith(("h.2.", "h.3."))


def test_only_the_shards_of_the_span_are_fetched(hub: LocalHub, tmp_path: Path, cache: Path) -> None:
    with fetch(resolve_order(hub, tmp_path), cache, is_of_last_blocks) as checkpoint:
        assert checkpoint.names() == {"h.2.weight", "h.2.bias", "h.3.weight", "h.3.bias"}
        assert torch.equal(checkpoint.tensor("h.3.bias"), tensors_of_blocks()["h.3.bias"])
    assert hub.fetched(REPO) == {"part-1.safetensors"}
    assert {request.token for request in hub.requests} == {"hf_good"}


def test_every_file_comes_from_the_commit_that_was_resolved(hub: LocalHub, tmp_path: Path, cache: Path) -> None:
    order = resolve_order(hub, tmp_path)
    fetch(order, cache, is_of_last_blocks).close()
    assert all(f"/resolve/{hub.commit(REPO)}/" in request.path for request in hub.requests)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_both_formats_are_read_from_the_cache(hub: LocalHub, tmp_path: Path, cache: Path, suffix: str) -> None:
    folder = hub.root / REPO
    for path in folder.iterdir():
        path.unlink()
    write_sharded(folder, suffix)
    with fetch(resolve_order(hub, tmp_path), cache, is_of_last_blocks) as checkpoint:
        assert torch.equal(checkpoint.tensor("h.2.weight"), tensors_of_blocks()["h.2.weight"])
    assert hub.fetched(REPO) == {f"part-1.{suffix}"}


def test_single_file_is_fetched_whole(hub: LocalHub, tmp_path: Path, cache: Path) -> None:
    write_single(hub.root / REPO)
    with fetch(resolve_order(hub, tmp_path), cache, is_of_last_blocks) as checkpoint:
        assert torch.equal(checkpoint.tensor("h.2.weight"), tensors_of_blocks()["h.2.weight"])


def test_second_load_asks_nothing(hub: LocalHub, tmp_path: Path, cache: Path) -> None:
    order = resolve_order(hub, tmp_path)
    fetch(order, cache, is_of_last_blocks).close()
    hub.requests.clear()
    fetch(order, cache, is_of_last_blocks).close()
    assert hub.requests == []


def test_progress_counts_bytes_up_to_the_announced_total(hub: LocalHub, tmp_path: Path, cache: Path) -> None:
    order = resolve_order(hub, tmp_path)
    reports: list[LoadProgress] = []
    fetch(order, cache, lambda _: True, reports).close()
    total = sum(file.size_bytes for file in order.weight_files)
    assert reports[-1] == LoadProgress("downloading", total, total)
    assert [report.bytes_done for report in reports] == sorted(report.bytes_done for report in reports)


def test_interrupted_transfer_goes_on_where_it_stopped(
    hub: LocalHub, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 50)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)  # between attempts
    order = resolve_order(hub, tmp_path)
    hub.broken_after["part-1.safetensors"] = 100
    reports: list[LoadProgress] = []
    with fetch(order, cache, is_of_last_blocks, reports) as checkpoint:
        assert torch.equal(checkpoint.tensor("h.3.weight"), tensors_of_blocks()["h.3.weight"])
    assert [request.first_byte for request in hub.requests if request.method == "GET"] == [0, 100]
    assert reports[-1].bytes_done == reports[-1].bytes_total


def test_gated_shard_is_refused_with_the_way_in(hub: LocalHub, tmp_path: Path, cache: Path) -> None:
    order = order_for(resolve_with(REPO, "main", HubAccess(hub.url, None, tmp_path / "coordinator-cache")))
    hub.gated.add(REPO)
    with pytest.raises(PermissionDeniedError, match=r"gated.*hf auth login"):
        fetch(order, cache, is_of_last_blocks)


def test_full_disk_is_told_before_anything_is_fetched(hub: LocalHub, tmp_path: Path, cache: Path) -> None:
    order = resolve_order(hub, tmp_path)
    with pytest.raises(
        ConfigurationError, match=r"need 0\.00 GiB in .*worker-cache, which has 0\.00 GiB.*--download-dir"
    ):
        fetch_checkpoint(order, is_of_last_blocks, lambda _: None, cache_folder=cache, measure=lambda _: 10)
    assert hub.requests == []


def test_a_download_leaves_of_the_disk_what_is_to_stay_free(hub: LocalHub, tmp_path: Path, cache: Path) -> None:
    order = replace(resolve_order(hub, tmp_path), store=StoreOptions(reserve_bytes=1 << 40))
    with pytest.raises(ConfigurationError, match=r"1024\.00 GiB are to stay free \(--disk-reserve\)"):
        fetch_checkpoint(order, is_of_last_blocks, lambda _: None, cache_folder=cache, measure=lambda _: 1 << 40)
    fetch(replace(order, store=StoreOptions()), cache, is_of_last_blocks).close()
    fetch_checkpoint(order, is_of_last_blocks, lambda _: None, cache_folder=cache, measure=lambda _: 0).close()


def test_worker_without_network_uses_its_cache(hub: LocalHub, tmp_path: Path, cache: Path) -> None:
    order = resolve_order(hub, tmp_path)
    fetch(order, cache, is_of_last_blocks).close()
    hub.__exit__()
    with fetch(order, cache, is_of_last_blocks) as checkpoint:
        assert "h.3.bias" in checkpoint.names()


def test_truncated_file_in_the_cache_is_named_with_its_place(hub: LocalHub, tmp_path: Path, cache: Path) -> None:
    order = resolve_order(hub, tmp_path)
    fetch(order, cache, is_of_last_blocks).close()
    (blob,) = (cache / "models--owner--model" / "blobs").iterdir()
    truncate(blob)
    with pytest.raises(ConfigurationError, match=rf"part-1\.safetensors of owner/model is truncated: .*{blob.name}"):
        fetch(order, cache, is_of_last_blocks)
    blob.unlink()
    fetch(order, cache, is_of_last_blocks).close()


def test_failing_report_ends_the_download(hub: LocalHub, tmp_path: Path, cache: Path) -> None:
    class UnwantedError(Exception):
        pass

    def refuse(_: LoadProgress) -> None:
        raise UnwantedError

    with pytest.raises(UnwantedError):
        fetch_checkpoint(resolve_order(hub, tmp_path), is_of_last_blocks, refuse, cache_folder=cache)

"""From a coordinator's start to its first request: what it says meanwhile, and what cannot be brought up."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import pytest

from cluster.errors import ConfigurationError, NotReadyError, StageUnavailableError
from cluster.load_order import LoadOrder, LoadProgress
from coordinator import stage_link
from tests.checkpoints import make_checkpoint
from tests.integration.local_cluster import CPU, local_cluster, starting, worker_here
from tests.small_checkpoints import truncate
from worker.executor import LoadedSpan
from worker.loading import TorchSpanLoader

PROMPT = "Call me Ishmael."


class HeldLoader(TorchSpanLoader):
    """Loads when it is told to."""

    def __init__(self, may_load: threading.Event) -> None:
        super().__init__(CPU)
        self._may_load = may_load

    def load(self, order: LoadOrder, on_progress: Callable[[LoadProgress], None]) -> LoadedSpan:
        self._may_load.wait()
        return super().load(order, on_progress)


@pytest.fixture
async def held() -> AsyncIterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


async def test_a_server_that_loads_says_so_and_then_serves(held: threading.Event) -> None:
    async with (
        worker_here(0, lambda *_: HeldLoader(held)) as address,
        starting("bloom-tiny", [address]) as cluster,
        cluster.client() as client,
    ):
        assert (await client.describe()).state == "loading"
        assert (await client.list_models())[0].name == "bloom-tiny"
        assert len(await client.tokenize(PROMPT)) > 1
        with pytest.raises(NotReadyError, match="the model is not ready yet"):
            await client.complete(PROMPT)
        held.set()
        await cluster.wait_ready()
        assert (await client.describe()).state == "ready"
        assert len((await client.complete(PROMPT, max_tokens=3, ignore_eos=True)).token_ids) == 3


async def test_a_server_stops_while_a_worker_loads(held: threading.Event) -> None:
    async with worker_here(0, lambda *_: HeldLoader(held)) as address:
        async with starting("bloom-tiny", [address]) as cluster, cluster.client() as client:
            assert (await client.describe()).state == "loading"
        held.set()
        async with starting("bloom-tiny", [address], generation=2) as cluster, cluster.client() as client:
            await cluster.wait_ready()
            assert len((await client.complete(PROMPT, max_tokens=3, ignore_eos=True)).token_ids) == 3


Damage = Callable[[Path], object]
SHARD = "model-00003-of-00004.safetensors"
DAMAGES: Mapping[str, tuple[Damage, str]] = {
    "truncated": (lambda folder: truncate(folder / SHARD), SHARD),
    "of another model": (
        lambda folder: make_checkpoint(folder, "llama", {"intermediate_size": 40}, num_shards=4),
        r"has shape \[40, 32\].*config.json implies \[56, 32\]",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
async def test_a_damaged_checkpoint_fails_the_cluster_with_the_file_named(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    folder = make_checkpoint(tmp_path, "llama", num_shards=4)
    config = (folder / "config.json").read_text()
    damage(folder)
    (folder / "config.json").write_text(config)
    with pytest.raises(StageUnavailableError, match=message) as caught:
        async with local_cluster(folder, 2):
            pass
    assert "not brought up" in caught.value.message


async def test_after_a_failed_start_the_server_still_says_why() -> None:
    async with (
        worker_here(0) as address,
        starting("bloom-tiny", [address], kv_memory=1 << 20) as cluster,
        cluster.client() as client,
    ):
        assert "--kv-memory" in str(await cluster.coordinator.wait_ended())
        status = await client.describe()
        assert status.state == "failed"
        assert "the model does not fit" in status.message
        with pytest.raises(StageUnavailableError, match="the model does not fit"):
            await client.complete(PROMPT)


async def test_a_worker_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_link, "HELLO_SECONDS", 0.5)
    async with worker_here(0) as address:
        pass  # nobody listens there any more
    async with worker_here(1) as other, starting("bloom-tiny", [other, address]) as cluster:
        assert f"worker at {address}" in str(await cluster.coordinator.wait_ended())


async def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigurationError, match="no tokenizer"):
        async with local_cluster(folder, 1):
            pass

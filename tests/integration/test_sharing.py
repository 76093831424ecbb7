"""Workers with disks of their own get from each other what one of them has, rather than from the hub."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import huggingface_hub
import pytest

from cluster.hub.download import HubAccess
from cluster.hub.resolve import resolve_with
from cluster.load_order import LoadOrder, LoadProgress, StoreOptions
from cluster.microbatch import Epoch
from cluster.model_spec import ModelSpec, Precision
from cluster.span import Span
from cluster.testing.hub import LocalHub
from cluster.wire.tls import Credentials
from coordinator.stage_link import StageLink
from tests.checkpoints import make_checkpoint
from tests.integration.local_cluster import Certify, mutual_tls, plaintext, torch_loader, worker_here
from tests.small_checkpoints import order_for
from worker.executor import LoadedSpan
from worker.loading import TorchSpanLoader
from worker.sharing.shelf import Shelf
from worker.store.folder import BlockStore
from worker.store.key import store_key
from worker.store.verify import verify_parts

REPO = "owner/model"
NUM_BLOCKS = 6
FIRST_HALF, SECOND_HALF, LAST_TWO, ALL_BUT_TWO = Span(0, 3), Span(3, 6), Span(4, 6), Span(0, 4)


class OwnDisk(TorchSpanLoader):
    """The loader of a worker that keeps downloads and parts in folders of its own."""

    def __init__(self, folder: Path, loader: TorchSpanLoader) -> None:
        self._folder, self._inner = folder, loader

    def load(self, order: LoadOrder, on_progress: Callable[[LoadProgress], None]) -> LoadedSpan:
        store = replace(
            order.store, store_folder=str(self._folder / "store"), download_folder=str(self._folder / "hub")
        )
        return self._inner.load(replace(order, store=store), on_progress)


@dataclass(frozen=True, slots=True)
class Machines:
    """Two workers and what leads to them."""

    addresses: Sequence[str]
    folders: Sequence[Path]
    certify: Certify

    async def load(self, number: int, order: LoadOrder, generation: int) -> None:
        """Let a worker load, with the other one as its neighbour."""
        others = tuple(address for address in self.addresses if address != self.addresses[number])
        link = StageLink(self.addresses[number], self.certify("head"))
        try:
            await link.load(replace(order, holders=others), Epoch(generation, 1), lambda _: None, stall_seconds=30.0)
        finally:
            await link.close()

    async def place(self, orders: Sequence[LoadOrder], generation: int) -> None:
        """Let both load, at the same time."""
        await asyncio.gather(*(self.load(number, order, generation) for number, order in enumerate(orders)))

    def parts(self, number: int, key: str) -> list[str]:
        """Return the whole parts that a worker has."""
        store = BlockStore(self.folders[number] / "store", key)
        assert not verify_parts(store, store.parts(), lambda _: None)
        return store.parts()


@asynccontextmanager
async def two_machines(folder: Path, certify: Certify = plaintext) -> AsyncIterator[Machines]:
    folders = [folder / f"machine-{number}" for number in range(2)]

    def new_loader(number: int, credentials: Credentials | None, shelf: Shelf) -> OwnDisk:
        return OwnDisk(folders[number], torch_loader(number, credentials, shelf))

    async with AsyncExitStack() as stack:
        workers = [worker_here(number, new_loader, certify(f"node-{number}")) for number in range(2)]
        yield Machines([await stack.enter_async_context(worker) for worker in workers], folders, certify)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    huggingface_hub.close_session()
    make_checkpoint(tmp_path / "hub" / REPO, "llama", {"num_hidden_layers": NUM_BLOCKS}, num_shards=3)
    with LocalHub(tmp_path / "hub") as running:
        yield running
    huggingface_hub.close_session()


@pytest.fixture
def spec(hub: LocalHub, tmp_path: Path) -> ModelSpec:
    found = resolve_with(REPO, "main", HubAccess(hub.url, cache_folder=tmp_path / "head"))
    hub.requests.clear()
    return found


def orders(spec: ModelSpec, spans: Sequence[Span], precision: Precision = Precision.INT8) -> list[LoadOrder]:
    """Return the orders of two stages; reversed spans give the later blocks to the first worker."""
    whole = replace(order_for(spec), num_stages=2, precision=precision)
    return [replace(whole, stage=0 if span.start == 0 else 1, span=span) for span in spans]


def num_sent(hub: LocalHub) -> Counter[str]:
    """Return how often the hub sent each file."""
    return Counter(request.path.rpartition("/")[2] for request in hub.requests if request.method == "GET")


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT8])
@pytest.mark.parametrize("certify", [plaintext, mutual_tls()], ids=["plaintext", "mutual TLS"])
async def test_the_hub_sends_each_shard_once(
    hub: LocalHub, spec: ModelSpec, tmp_path: Path, certify: Certify, precision: Precision
) -> None:
    """The middle shard holds blocks of both spans, and shards by name hold parts of all."""
    async with two_machines(tmp_path, certify) as machines:
        await machines.place(orders(spec, (FIRST_HALF, SECOND_HALF), precision), generation=1)
    shards = {file.name for file in spec.weight_files}
    assert num_sent(hub) == Counter(shards)
    held = [{path.name for path in folder.rglob("*.safetensors")} for folder in machines.folders]
    assert held[0] & held[1]
    assert not [path for folder in machines.folders for path in folder.rglob("*.part")]


async def test_blocks_that_move_come_converted_from_the_worker_that_had_them(
    hub: LocalHub, spec: ModelSpec, tmp_path: Path
) -> None:
    key = store_key(spec.source, Precision.INT8)
    async with two_machines(tmp_path, mutual_tls()) as machines:
        await machines.place(orders(spec, (FIRST_HALF, SECOND_HALF)), generation=1)
        downloads = [sorted((folder / "hub").rglob("*.safetensors")) for folder in machines.folders]
        hub.requests.clear()
        await machines.place(orders(spec, (LAST_TWO, ALL_BUT_TWO)), generation=2)
        assert hub.requests == []
        assert downloads == [sorted((folder / "hub").rglob("*.safetensors")) for folder in machines.folders]
        assert {"block-0004", "block-0005", "head"} < set(machines.parts(0, key))
        assert {"embedding", "block-0000", "block-0003"} < set(machines.parts(1, key))


async def test_what_a_neighbour_has_damaged_is_converted_instead(
    hub: LocalHub, spec: ModelSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = store_key(spec.source, Precision.INT8)
    async with two_machines(tmp_path) as machines:
        await machines.place(orders(spec, (FIRST_HALF, SECOND_HALF)), generation=1)
        damaged = machines.folders[1] / "store" / key / "block-0004.weights"
        data = bytearray(damaged.read_bytes())
        data[-4096] ^= 1
        damaged.write_bytes(data)
        await machines.load(0, orders(spec, (LAST_TWO,))[0], generation=2)
        assert {"block-0004", "block-0005", "head"} < set(machines.parts(0, key))
    assert "did not send block-0004.weights" in caplog.text
    assert set(num_sent(hub).values()) == {1}


async def test_a_shard_that_a_neighbour_has_damaged_comes_from_the_hub(
    hub: LocalHub, spec: ModelSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its size is right: only the digest, which the hub tells, is not."""
    (order,) = orders(spec, (FIRST_HALF,), Precision.FP32)
    async with two_machines(tmp_path) as machines:
        await machines.load(1, order, generation=1)
        damaged = sorted((machines.folders[1] / "hub").rglob("*.safetensors"))[0]
        data = bytearray(damaged.read_bytes())
        data[-1] ^= 1
        damaged.write_bytes(data)
        await machines.load(0, order, generation=1)
    assert f"did not send {damaged.name}" in caplog.text
    counts = num_sent(hub)
    assert counts.pop(damaged.name) == 2
    assert set(counts.values()) == {1}


async def test_a_worker_that_is_gone_is_no_obstacle(hub: LocalHub, spec: ModelSpec, tmp_path: Path) -> None:
    (order,) = orders(spec, (FIRST_HALF,))
    async with two_machines(tmp_path) as machines:
        gone = replace(machines, addresses=(machines.addresses[0], "127.0.0.1:1"))
        await gone.load(0, order, generation=1)
    assert set(num_sent(hub).values()) == {1}


async def test_discarded_shards_are_not_offered(hub: LocalHub, spec: ModelSpec, tmp_path: Path) -> None:
    """Who comes later gets them from the hub."""
    discarding = StoreOptions(is_source_discarded=True)
    first, second = (replace(order, store=discarding) for order in orders(spec, (FIRST_HALF, SECOND_HALF)))
    async with two_machines(tmp_path) as machines:
        await machines.place([first, second], generation=1)
        assert not [path for folder in machines.folders for path in (folder / "hub").rglob("*.safetensors")]
        hub.requests.clear()
        (damaged,) = machines.folders[0].rglob("block-0001.json")
        damaged.write_text("{}")
        await machines.load(0, first, generation=2)
    assert set(num_sent(hub).values()) == {1}
    assert not list((machines.folders[0] / "hub").rglob("*.safetensors"))

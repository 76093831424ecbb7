"""Files are brought from a worker that has them, and fetched from their origin by one worker only."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cluster.errors import NotFoundError, StageUnavailableError
from cluster.rpc.v1 import stage_service_pb2_grpc
from cluster.wire.channels import bind, new_server
from worker.sharing.holders import Holdings, Neighbours, RemoteHolder, connect
from worker.sharing.service import StoreServicer
from worker.sharing.shelf import Claim, Shelf

COLLECTION = "hub/org/model@abc"


class LocalHolder:
    """Another worker of this process, without a network."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self.is_broken = False

    def list(self, collection: str) -> Holdings:
        files = {name: path.stat().st_size for name, path in self._shelf.files(collection).items()}
        claims = {name: Claim(claim.has_begun) for name, claim in self._shelf.claims(collection).items()}
        return Holdings(files, claims)

    def read(self, collection: str, name: str, start: int, end: int) -> Iterator[bytes]:
        data = self._shelf.files(collection)[name].read_bytes()[start:end]
        if self.is_broken:
            yield data[: len(data) // 2]
            raise StageUnavailableError("the line went dead")
        yield data

    def close(self) -> None:
        """Nothing to close."""


class Worker:
    """A worker with a folder, which fetches from an origin that counts."""

    def __init__(self, address: str, folder: Path, fetched: list[str]) -> None:
        folder.mkdir()
        self.shelf, self.folder, self._fetched = Shelf(), folder, fetched
        self.shelf.address = address
        self.shelf.offer(COLLECTION, self.listing)
        self.neighbours: Neighbours

    def listing(self) -> dict[str, Path]:
        return {path.name: path for path in self.folder.iterdir() if path.suffix != ".part"}

    def know(self, others: list[Worker], wait: Callable[[float], None]) -> None:
        holders = {other.shelf.address: LocalHolder(other.shelf) for other in others if other is not self}
        self.neighbours = Neighbours(self.shelf, holders, wait=wait)

    def bring(self, name: str) -> bool:
        def get(count: Callable[[int], None]) -> None:
            self._fetched.append(name)
            count(4)
            (self.folder / f"{name}.part").write_bytes(b"data")
            (self.folder / f"{name}.part").rename(self.folder / name)

        return self.neighbours.bring(COLLECTION, [name], self.folder, get)


def make_workers(tmp_path: Path, number: int, fetched: list[str]) -> list[Worker]:
    workers = [Worker(f"10.0.0.{index}:7100", tmp_path / str(index), fetched) for index in range(number)]
    for worker in workers:
        worker.know(workers, threading.Event().wait)
    return workers


def test_a_file_that_a_neighbour_has_is_not_fetched_again(tmp_path: Path) -> None:
    fetched: list[str] = []
    first, second = make_workers(tmp_path, 2, fetched)
    assert not first.bring("shard")
    assert second.bring("shard")
    assert fetched == ["shard"]
    assert (second.folder / "shard").read_bytes() == b"data"
    assert not list(second.folder.glob("*.part"))


@pytest.mark.parametrize("attempt", range(20))
def test_workers_that_need_a_file_at_the_same_moment_fetch_it_once(tmp_path: Path, attempt: int) -> None:
    fetched: list[str] = []
    workers = make_workers(tmp_path, 4, fetched)
    gate = threading.Barrier(4)

    def run(worker: Worker) -> None:
        gate.wait()
        worker.bring(f"shard-{attempt}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, workers))
    assert len(fetched) == 1
    assert all((worker.folder / f"shard-{attempt}").exists() for worker in workers)


def test_a_neighbour_that_breaks_off_is_passed_over(tmp_path: Path) -> None:
    fetched: list[str] = []
    first, second = make_workers(tmp_path, 2, fetched)
    first.bring("shard")
    broken = LocalHolder(first.shelf)
    broken.is_broken = True
    alone = Neighbours(second.shelf, {first.shelf.address: broken}, wait=threading.Event().wait)
    assert not alone.bring(COLLECTION, ["shard"], second.folder, lambda _count: fetched.append("again"))
    assert fetched == ["shard", "again"]
    assert not list(second.folder.iterdir())


def test_a_fetch_that_fails_leaves_the_turn_to_the_next(tmp_path: Path) -> None:
    first, second = make_workers(tmp_path, 2, [])

    def fail(_count: Callable[[int], None]) -> None:
        raise OSError("no network")

    with pytest.raises(OSError, match="no network"):
        first.neighbours.bring(COLLECTION, ["shard"], first.folder, fail)
    assert not second.bring("shard")


@asynccontextmanager
async def serving(shelf: Shelf) -> AsyncIterator[str]:
    server = new_server()
    stage_service_pb2_grpc.add_StoreServiceServicer_to_server(StoreServicer(shelf), server)
    port = bind(server, "127.0.0.1", range(0), None)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def test_files_travel_over_a_socket_in_ranges(tmp_path: Path) -> None:
    shelf = Shelf()
    data = bytes(range(256)) * 20_000
    (tmp_path / "block").write_bytes(data)
    (tmp_path / "block.json").write_text("{}")
    names = ("block", "block.json")
    shelf.offer("store/key", lambda: {name: tmp_path / name for name in names})
    own = Shelf()
    own.address = "10.0.0.9:1"
    async with serving(shelf) as address:
        neighbours = Neighbours(own, {address: connect(address)}, wait=threading.Event().wait)
        counted: list[int] = []
        copy = asyncio.to_thread(
            neighbours.bring, "store/key", ["block.json", "block"], tmp_path / "copy", _never, counted.append
        )
        assert await copy
        neighbours.close()
    assert (tmp_path / "copy" / "block").read_bytes() == data
    assert sum(counted) == len(data) + 2


async def test_nothing_but_what_the_shelf_lists_is_served(tmp_path: Path) -> None:
    shelf = Shelf()
    (tmp_path / "secret").write_text("x")
    shelf.offer("store/key", dict)
    async with serving(shelf) as address:
        with pytest.raises(NotFoundError):
            await asyncio.to_thread(_read_all, connect(address), "../secret")


async def test_a_worker_that_is_gone_is_no_obstacle(tmp_path: Path) -> None:
    async with serving(Shelf()) as address:
        pass
    own = Shelf()
    neighbours = Neighbours(own, {address: connect(address)}, wait=threading.Event().wait)
    calls: list[str] = []
    brought = asyncio.to_thread(neighbours.bring, "c", ["f"], tmp_path, lambda _count: calls.append("origin"))
    assert not await brought
    assert calls == ["origin"]


def _read_all(holder: RemoteHolder, name: str) -> bytes:
    try:
        return b"".join(holder.read("store/key", name, 0, 1))
    finally:
        holder.close()


def _never(_count: Callable[[int], None]) -> None:
    raise AssertionError("the neighbour has it")

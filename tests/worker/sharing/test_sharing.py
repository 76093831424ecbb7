"""Files are brought from a worker that has them, and fetched from their origin by one worker only."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cluster.errors import NotFoundError, StageUnavailableError, StorageError
from cluster.rpc.v1 import stage_service_pb2_grpc
from cluster.wire.channels import bind, new_server
from worker.sharing.copying import Wanted
from worker.sharing.holders import (
    MEET_SECONDS,
    POLL_SECONDS,
    STALL_SECONDS,
    Holdings,
    Neighbours,
    RemoteHolder,
    connect,
)
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
        claims = self._shelf.claims(collection).items()
        return Holdings(files, {name: Claim(claim.has_begun, claim.bytes_done) for name, claim in claims})

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

    def know(self, others: list[Worker]) -> None:
        holders = {other.shelf.address: LocalHolder(other.shelf) for other in others if other is not self}
        self.neighbours = Neighbours(self.shelf, holders, pause=blink)

    def bring(self, name: str) -> bool:
        def get(count: Callable[[int], None]) -> None:
            self._fetched.append(name)
            count(4)
            (self.folder / f"{name}.part").write_bytes(b"data")
            (self.folder / f"{name}.part").rename(self.folder / name)

        return self.neighbours.bring(wanted(self.folder, name), get)


def blink(_seconds: float) -> None:
    """Let other threads run."""
    threading.Event().wait(0.001)


def wanted(folder: Path, *names: str, check: Callable[[], None] = lambda: None) -> Wanted:
    return Wanted(COLLECTION, names, folder, check)


def make_workers(tmp_path: Path, number: int, fetched: list[str]) -> list[Worker]:
    workers = [Worker(f"10.0.0.{index}:7100", tmp_path / str(index), fetched) for index in range(number)]
    for worker in workers:
        worker.know(workers)
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
    counted: list[int] = []
    alone = Neighbours(second.shelf, {first.shelf.address: broken}, pause=blink)
    assert not alone.bring(wanted(second.folder, "shard"), lambda _count: fetched.append("again"), counted.append)
    assert fetched == ["shard", "again"]
    assert not list(second.folder.iterdir())
    assert max(counted) == 2  # half of it came,
    assert sum(counted) == 0  # and was taken back


def test_what_a_neighbour_has_wrong_is_asked_for_once(tmp_path: Path) -> None:
    fetched: list[str] = []
    first, second = make_workers(tmp_path, 2, fetched)
    first.bring("shard")
    checks: list[str] = []

    def refuse() -> None:
        checks.append((second.folder / "shard.part").read_text())
        raise StorageError("not what was announced")

    order = wanted(second.folder, "shard", check=refuse)
    assert not second.neighbours.bring(order, lambda _count: fetched.append("again"))
    assert (checks, fetched) == (["data"], ["shard", "again"])
    assert not list(second.folder.iterdir())
    assert not second.neighbours.copy(order)
    assert len(checks) == 1


def test_a_file_that_another_process_of_the_machine_brought_is_not_copied(tmp_path: Path) -> None:
    fetched: list[str] = []
    first, _ = make_workers(tmp_path, 2, fetched)
    (first.folder / "shard").write_text("here")
    assert first.bring("shard")
    assert fetched == []


def test_two_copies_into_one_folder_are_one(tmp_path: Path) -> None:
    fetched: list[str] = []
    first, second, third = make_workers(tmp_path, 3, fetched)
    first.bring("shard")
    copied: list[int] = []
    order = wanted(second.folder, "shard")
    with ThreadPoolExecutor(2) as pool:
        done = [pool.submit(worker.neighbours.copy, order, copied.append) for worker in (second, third)]
        assert all(future.result() for future in done)
    assert sum(copied) == 4
    assert [path.name for path in second.folder.iterdir()] == ["shard"]


class Stuck:
    """A worker that began to fetch, and goes on for some answers only."""

    def __init__(self, num_answers_with_progress: int) -> None:
        self.num_answers, self._num_moving = 0, num_answers_with_progress

    def list(self, collection: str) -> Holdings:
        assert collection == COLLECTION
        self.num_answers += 1
        return Holdings({}, {"shard": Claim(True, min(self.num_answers, self._num_moving))})

    def read(self, collection: str, name: str, start: int, end: int) -> Iterator[bytes]:
        raise AssertionError(f"{name} of {collection} was read from {start} to {end}")

    def close(self) -> None:
        """Nothing to close."""


def test_a_neighbour_that_fetches_nothing_is_given_up_and_its_bytes_are_shown_until_then(tmp_path: Path) -> None:
    shelf, stuck = Shelf(), Stuck(500)
    shelf.address = "10.0.0.5:1"
    counted: list[int] = []
    waited: list[float] = []
    neighbours = Neighbours(shelf, {"10.0.0.1:1": stuck}, pause=waited.append)
    calls: list[str] = []
    assert not neighbours.bring(wanted(tmp_path, "shard"), lambda _: calls.append("origin"), counted.append)
    assert calls == ["origin"]
    shown = [sum(counted[: index + 1]) for index in range(len(counted))]
    assert max(shown) == 500
    assert shown[-1] == 0  # what the other had done does not count
    assert sum(waited) == pytest.approx(500 * POLL_SECONDS + STALL_SECONDS, abs=5 * POLL_SECONDS)


def test_a_neighbour_that_was_not_told_to_load_yet_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "shard").write_text("data")
    late, own = Shelf(), Shelf()
    polls: list[float] = []

    def pause(seconds: float) -> None:
        polls.append(seconds)
        if len(polls) == 3:
            late.offer(COLLECTION, lambda: {"shard": tmp_path / "shard"})

    neighbours = Neighbours(own, {"10.0.0.1:1": LocalHolder(late)}, pause=pause)
    assert neighbours.copy(wanted(tmp_path / "copy", "shard"))
    assert len(polls) == 3


def test_a_neighbour_that_is_never_told_to_load_is_waited_for_once(tmp_path: Path) -> None:
    own = Shelf()
    waited: list[float] = []
    neighbours = Neighbours(own, {"10.0.0.1:1": LocalHolder(Shelf())}, pause=waited.append)
    for name in ("one", "two"):
        assert not neighbours.copy(wanted(tmp_path, name))
    assert sum(waited) == MEET_SECONDS


def test_a_fetch_that_fails_leaves_the_turn_to_the_next(tmp_path: Path) -> None:
    first, second = make_workers(tmp_path, 2, [])

    def fail(_count: Callable[[int], None]) -> None:
        raise OSError("no network")

    with pytest.raises(OSError, match="no network"):
        first.neighbours.bring(wanted(first.folder, "shard"), fail)
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
    shelf.offer(COLLECTION, lambda: {name: tmp_path / name for name in names})
    own = Shelf()
    own.address = "10.0.0.9:1"
    async with serving(shelf) as address:
        neighbours = Neighbours(own, {address: connect(address)})
        counted: list[int] = []
        assert await asyncio.to_thread(neighbours.copy, wanted(tmp_path / "copy", *names), counted.append)
        neighbours.close()
        assert not await asyncio.to_thread(neighbours.copy, wanted(tmp_path / "later", *names))
    assert (tmp_path / "copy" / "block").read_bytes() == data
    assert sum(counted) == len(data) + 2


async def test_nothing_but_what_the_shelf_lists_is_served(tmp_path: Path) -> None:
    shelf = Shelf()
    (tmp_path / "secret").write_text("x")
    shelf.offer(COLLECTION, dict)
    async with serving(shelf) as address:
        with pytest.raises(NotFoundError):
            await asyncio.to_thread(_read_all, connect(address), "../secret")


async def test_a_worker_that_is_gone_is_no_obstacle(tmp_path: Path) -> None:
    async with serving(Shelf()) as address:
        pass
    own = Shelf()
    calls: list[str] = []
    with Neighbours(own, {address: connect(address)}) as neighbours:
        brought = asyncio.to_thread(neighbours.bring, wanted(tmp_path, "f"), lambda _count: calls.append("origin"))
        assert not await brought
    assert calls == ["origin"]


def _read_all(holder: RemoteHolder, name: str) -> bytes:
    try:
        return b"".join(holder.read(COLLECTION, name, 0, 1))
    finally:
        holder.close()

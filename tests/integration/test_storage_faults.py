"""Disks that lie, fail, fill up, and processes that die while they convert: whole servers, real files and processes."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.client import AsyncClient
from cluster.errors import ConfigurationError, SpanwiseError, StageUnavailableError, StorageError
from cluster.load_order import LoadOrder, LoadProgress, StoreOptions
from cluster.microbatch import StepHeader
from tests.checkpoints import make_checkpoint
from tests.integration.local_cluster import CPU, LocalCluster, WatchedExecutor, local_cluster
from tests.worker.store.converted import fill, parts_of, start_process, stored_order
from tests.worker.stream.disk import Disk, flip_byte
from worker.architectures import open_architecture
from worker.executor import Executor, LoadedSpan, StageOutput
from worker.loading import TorchSpanLoader
from worker.sharing.shelf import Shelf
from worker.store.copied import store_of
from worker.store.fill import StoreFiller
from worker.store.folder import BlockStore
from worker.stream import opening
from worker.stream.streamed_file import StreamedFile
from worker.weights import CheckpointSource

PROMPT = "Call me Ishmael."
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 100, "ignore_eos": True}
RING_BYTES = 384 << 10
TMPFS_BYTES = 96 << 10  # holds some parts of the model below, not all


class StreamingLoader(TorchSpanLoader):
    """Streams every block, through a store of the test's own. `on_failure` hears of steps that fail."""

    def __init__(self, store_folder: Path, on_failure: Callable[[], None], shelf: Shelf) -> None:
        super().__init__(CPU, shelf=shelf)
        self._store_folder, self._on_failure = store_folder, on_failure

    def load(self, order: LoadOrder, on_progress: Callable[[LoadProgress], None]) -> LoadedSpan:
        store = StoreOptions(store_folder=str(self._store_folder))
        order = replace(order, store=store, num_streamed=len(order.span), ring_bytes=RING_BYTES, memory_bytes=0)
        loaded = super().load(order, on_progress)
        return replace(loaded, executor=_Watched(loaded.executor, self._on_failure))


class _Watched(WatchedExecutor):
    """Calls `on_failure` when a step fails for its storage."""

    def __init__(self, executor: Executor, on_failure: Callable[[], None]) -> None:
        super().__init__(executor, lambda _header: None)
        self._on_failure = on_failure

    def execute(
        self, header: StepHeader, tensors: Mapping[str, torch.Tensor], on_block: Callable[[int], None]
    ) -> StageOutput:
        try:
            return super().execute(header, tensors, on_block)
        except StorageError:
            self._on_failure()
            raise


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", "llama")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def serve(model: Path, store: Path, on_failure: Callable[[], None] = lambda: None) -> Any:
    """Serve with two workers that stream."""
    return local_cluster(
        model,
        2,
        new_loader=lambda _number, _credentials, shelf: StreamingLoader(store, on_failure, shelf),
        precision="int8",
    )


def part_path(store: Path, part: str) -> Path:
    (path,) = store.glob(f"*/{part}.weights")
    return path


def flip(path: Path) -> None:
    flip_byte(path, path.stat().st_size - 4096)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4096)


async def damaged_midway(client: AsyncClient, damage: Callable[[], None]) -> tuple[list[int], SpanwiseError | None]:
    """Damage something after the first piece; return the tokens that came, and the error that ended them."""
    generation = client.generate(PROMPT, **GREEDY)
    token_ids = list((await anext(generation)).token_ids)
    damage()
    try:
        async for piece in generation:
            token_ids += piece.token_ids
    except SpanwiseError as error:
        return token_ids, error
    return token_ids, None


@pytest.mark.parametrize("damage", [flip, cut])
async def test_a_block_that_is_damaged_while_it_serves_is_made_again_and_no_token_changes(
    model: Path, store: Path, damage: Callable[[Path], None]
) -> None:
    async with serve(model, store) as cluster, cluster.client() as client:
        expected = await client.complete(PROMPT, **GREEDY)
        path = part_path(store, "block-0002")
        whole = path.read_bytes()
        token_ids, error = await damaged_midway(client, partial(damage, path))
        assert error is None
        assert tuple(token_ids) == expected.token_ids
        assert path.read_bytes() == whole


@pytest.mark.parametrize("damage", [flip, cut])
async def test_damage_that_cannot_be_repaired_ends_requests_by_the_blocks_name_and_then_the_server(
    model: Path, store: Path, damage: Callable[[Path], None]
) -> None:
    async with serve(model, store) as cluster, cluster.client() as client:
        expected = await client.complete(PROMPT, **GREEDY)
        shutil.rmtree(model)
        token_ids, error = await damaged_midway(client, partial(damage, part_path(store, "block-0002")))
        assert isinstance(error, StorageError | StageUnavailableError)
        assert "block-0002" in error.message
        assert tuple(token_ids) == expected.token_ids[: len(token_ids)]
        assert "block-0002" in (await _ended(cluster) or "")
        with pytest.raises(SpanwiseError):
            await client.complete(PROMPT, **GREEDY)


async def _ended(cluster: LocalCluster) -> str | None:
    return await cluster.coordinator.wait_ended()


async def test_a_disk_that_fails_for_a_while_ends_the_requests_of_that_while(
    model: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk()
    monkeypatch.setattr(opening, "StreamedFile", partial(StreamedFile, read_at=disk.read_at))

    def recover() -> None:
        disk.failing = False

    def fail() -> None:
        disk.failing = True

    async with serve(model, store, recover) as cluster, cluster.client() as client:
        expected = await client.complete(PROMPT, **GREEDY)
        token_ids, error = await damaged_midway(client, fail)
        assert isinstance(error, StorageError)
        assert "block-000" in error.message
        assert tuple(token_ids) == expected.token_ids[: len(token_ids)]
        assert (await client.complete(PROMPT, **GREEDY)).token_ids == expected.token_ids


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
async def test_a_block_that_was_damaged_while_nothing_ran_is_made_again(
    model: Path, store: Path, damage: Callable[[Path], None]
) -> None:
    async with serve(model, store) as cluster, cluster.client() as client:
        expected = await client.complete(PROMPT, **GREEDY)
    damage(part_path(store, "block-0000"))
    async with serve(model, store) as cluster, cluster.client() as client:
        assert (await client.complete(PROMPT, **GREEDY)).token_ids == expected.token_ids


def digest(store: BlockStore) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.folder.iterdir() if path.suffix in (".json", ".weights")}


@pytest.mark.slow
@pytest.mark.parametrize("num_parts", [1, 3])
def test_a_conversion_that_is_killed_goes_on_where_it_was(model: Path, store: Path, num_parts: int) -> None:
    order = stored_order(model, store)
    process = start_process(model, store)
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("\n")
        process.stdin.flush()
        begun = [process.stdout.readline().strip() for _ in range(num_parts)]
    finally:
        process.kill()
        process.communicate()
    finished = {part: store_of(order).path(part).stat().st_ino for part in begun if store_of(order).has(part)}
    assert set(begun[:-1]) <= set(finished)
    fill(order)
    assert {part: store_of(order).path(part).stat().st_ino for part in finished} == finished
    fresh = stored_order(model, store.with_name("fresh"))
    fill(fresh)
    assert digest(store_of(order)) == digest(store_of(fresh))
    assert not list(store.rglob("*.part"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    if not _mount(f"size={TMPFS_BYTES}", folder):
        pytest.skip("a small file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def _mount(options: str, folder: Path) -> bool:
    command: Sequence[str | Path] = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def test_a_disk_that_fills_up_during_conversion_keeps_whole_parts_and_goes_on_once_there_is_room(
    model: Path, small_disk: Path
) -> None:
    order = stored_order(model, small_disk)
    store = store_of(order)
    filler = StoreFiller(
        order,
        open_architecture(order.config),
        store,
        lambda: CheckpointSource(order),
        lambda _: None,
        measure=lambda _: 1 << 40,  # as if others took the room afterwards
    )
    with pytest.raises(ConfigurationError, match="the disk is full"):
        filler.fill(parts_of(order))
    assert store.parts()
    assert not list(small_disk.rglob("*.part"))
    assert _mount(f"remount,size={64 << 20}", small_disk)
    filler.fill(parts_of(order))
    assert set(store.parts()) == {part.name for part in parts_of(order)}

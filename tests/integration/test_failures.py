"""What becomes of requests when a client, a step, a worker process or the server itself goes away."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial

import pytest

from cluster.client import AsyncClient
from cluster.client.generation import Generation
from cluster.errors import InvariantError, NotFoundError, NotReadyError, SpanwiseError, StageUnavailableError
from cluster.microbatch import Epoch, StepHeader
from coordinator import events
from tests.integration.local_cluster import (
    PROJECT,
    LocalCluster,
    WatchedLoader,
    local_cluster,
    serving,
    worker_here,
    worker_process,
)

MODEL = "bloom-tiny"
PROMPT = "The state of the Union"
LONG = {"max_tokens": 2000, "ignore_eos": True}


@pytest.fixture
async def cluster() -> AsyncIterator[LocalCluster]:
    async with local_cluster(MODEL, 2) as running:
        yield running


@pytest.fixture
async def client(cluster: LocalCluster) -> AsyncIterator[AsyncClient]:
    async with cluster.client() as connected:
        yield connected


async def begin(client: AsyncClient, num_requests: int) -> list[Generation]:
    """Start long requests and wait for the first piece of each."""
    generations = [client.generate(f"{PROMPT} {number}", **LONG) for number in range(num_requests)]
    async with asyncio.timeout(20):
        await asyncio.gather(*map(anext, generations))
    return generations


async def error_of(generation: Generation) -> BaseException:
    """Return the error that ends a stream."""
    async with asyncio.timeout(20):
        with pytest.raises(SpanwiseError) as caught:
            async for _ in generation:
                pass
    return caught.value


def close_stream(generation: Generation, _client: AsyncClient) -> asyncio.Future[None]:
    return asyncio.ensure_future(generation.aclose())


def close_connection(_generation: Generation, client: AsyncClient) -> asyncio.Future[None]:
    return asyncio.ensure_future(client.close())


@pytest.mark.parametrize("leave", [close_stream, close_connection])
async def test_pages_of_a_client_that_leaves_are_free(
    cluster: LocalCluster, client: AsyncClient, leave: Callable[[Generation, AsyncClient], asyncio.Future[None]]
) -> None:
    async with cluster.client() as leaver:
        generations = await begin(leaver, 2)
        status = await client.describe()
        assert (status.num_running, status.num_free_pages < status.num_pages) == (2, True)
        for generation in generations:
            await leave(generation, leaver)
        await cluster.wait_until_pages_are_free(client)
    assert (await client.describe()).epoch == status.epoch


async def test_requests_that_end_in_every_way_at_once_leave_nothing(cluster: LocalCluster, client: AsyncClient) -> None:
    expected = await client.complete(PROMPT, max_tokens=16, ignore_eos=True)

    async def run(number: int) -> None:
        generation = client.generate(PROMPT, max_tokens=16, ignore_eos=True, request_id=f"request-{number}")
        token_ids: list[int] = []
        async for piece in generation:
            token_ids += piece.token_ids
            if len(token_ids) == number % 16 and number % 4 == 1:
                await generation.aclose()
                break
            if len(token_ids) == number % 16 and number % 4 == 2:
                with suppress(NotFoundError):  # it may have ended in the meantime
                    await client.abort(generation.request_id)
        assert tuple(token_ids) == expected.token_ids[: len(token_ids)]

    await asyncio.gather(*map(run, range(48)))
    await cluster.wait_until_pages_are_free(client)
    status = await client.describe()
    assert (status.num_running, status.num_waiting, status.num_requests_failed) == (0, 0, 0)


@pytest.mark.slow
async def test_pages_of_a_client_process_that_dies_are_free(cluster: LocalCluster, client: AsyncClient) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.integration.vanishing_client", cluster.address),
        cwd=PROJECT,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    async with asyncio.timeout(30):
        assert await process.stdout.readline()
    assert (await client.describe()).num_running == 1
    process.kill()
    await process.communicate()
    await cluster.wait_until_pages_are_free(client)


@pytest.mark.slow
@pytest.mark.parametrize("cause", [signal.SIGKILL, signal.SIGSTOP])
async def test_lost_worker_ends_every_stream_and_is_named(cause: signal.Signals) -> None:
    """A killed one closes its connections; a stopped one, like a machine that vanished, just says nothing more."""
    async with worker_here(0) as first, worker_process(1) as middle, worker_here(2) as last:
        addresses = [first, middle.address, last]
        async with serving(MODEL, addresses, max_running=4) as cluster, cluster.client() as client:
            running = await begin(client, 4)
            waiting = asyncio.create_task(client.complete(PROMPT, **LONG))
            async with asyncio.timeout(10):
                while not (await client.describe()).num_waiting:
                    pass
            middle.process.send_signal(cause)
            lost_at = time.monotonic()
            errors = await asyncio.gather(*map(error_of, running), waiting, return_exceptions=True)
            print(f"every stream was told {time.monotonic() - lost_at:.2f} s after {cause.name}")
            assert [type(error) for error in errors] == [StageUnavailableError] * 5
            assert all("node-1" in str(error) for error in errors)
            async with asyncio.timeout(20):
                assert "stage 1" in str(await cluster.coordinator.wait_ended())
            status = await client.describe()
            assert status.state == "failed"
            assert "stage 1 (worker w1 on node-1" in status.message
            assert [stage.state for stage in status.stages] == ["ready", "lost", "ready"]
            assert (status.num_running, status.num_waiting) == (0, 0)
            with pytest.raises(StageUnavailableError, match="stage 1"):
                await client.complete(PROMPT)
        if middle.process.returncode is None:
            middle.process.kill()  # a stopped one does not end by itself


class FailsOnce:
    """Raises in the compute thread of a stage, in the first step after it was told to."""

    def __init__(self, stage: int) -> None:
        self.stage = stage
        self.is_armed = threading.Event()

    def __call__(self, stage: int, _header: StepHeader) -> None:
        if stage == self.stage and self.is_armed.is_set():
            self.is_armed.clear()
            raise RuntimeError("out of luck")


@pytest.mark.parametrize("stage", [0, 1, 2])
async def test_failed_step_ends_its_requests_and_no_others(stage: int) -> None:
    fault = FailsOnce(stage)
    loader = partial(WatchedLoader, on_execute=fault)
    async with local_cluster(MODEL, new_loader=loader, max_running=2) as cluster, cluster.client() as client:
        expected = await client.complete(PROMPT, max_tokens=8)
        epoch = (await client.describe()).epoch
        running = await begin(client, 2)
        waiting = asyncio.create_task(client.complete(PROMPT, max_tokens=8))
        async with asyncio.timeout(10):
            while not (await client.describe()).num_waiting:
                pass
        fault.is_armed.set()
        for error in await asyncio.gather(*map(error_of, running)):
            assert isinstance(error, InvariantError)
            assert f"failed at stage {stage}" in error.message
            assert "out of luck" in error.message
        async with asyncio.timeout(20):
            assert (await waiting).token_ids == expected.token_ids
            assert (await client.complete(PROMPT, max_tokens=8)).token_ids == expected.token_ids
        status = await client.describe()
        assert (status.state, status.num_requests_failed) == ("ready", 2)
        assert status.epoch != epoch
        await cluster.wait_until_pages_are_free(client)


async def test_stopped_server_tells_its_streams(cluster: LocalCluster, client: AsyncClient) -> None:
    generations = await begin(client, 3)
    errors, _ = await asyncio.gather(asyncio.gather(*map(error_of, generations)), cluster.coordinator.stop())
    for error in errors:
        assert isinstance(error, NotReadyError)
        assert error.reason == "DRAINING"
    with pytest.raises(StageUnavailableError, match="no server answers"):
        await client.complete(PROMPT)


async def test_error_of_our_own_fails_the_cluster_instead_of_hanging(
    cluster: LocalCluster, client: AsyncClient
) -> None:
    generations = await begin(client, 2)
    cluster.coordinator.engine().post(events.EpochOpened(Epoch(1, 99), num_stages=2))  # while another is open
    for error in await asyncio.gather(*map(error_of, generations)):
        assert isinstance(error, StageUnavailableError)
        assert "the coordinator cannot go on" in error.message
    assert (await client.describe()).state == "failed"
    with pytest.raises(StageUnavailableError, match="cannot go on"):
        await client.complete(PROMPT)

"""A whole server below Ray, on this machine: stage servers, in this process or in one each, and their coordinator.

Covers starting, waiting until ready, and stopping. Where Ray puts processes and how it tells of their death is
`cluster.serve`'s.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.client import AsyncClient, RetryPolicy
from cluster.clock import SystemClock
from cluster.config import ServeConfig
from cluster.errors import StageUnavailableError
from cluster.hub.resolve import resolve
from cluster.load_order import LoadOrder, LoadProgress
from cluster.microbatch import StepHeader
from cluster.model_spec import ModelSizes, ModelSpec
from cluster.placement import WorkerId, WorkerInfo
from cluster.testing.executor import OnExecute
from cluster.wire.channels import client_channel
from cluster.wire.tls import CertificateAuthority, Credentials, SigningRequest
from coordinator.coordinator import HEALTH_NAME, Coordinator
from coordinator.order import CoordinatorOrder
from worker import checkpoint_client
from worker.executor import Executor, LoadedSpan, SpanLoader, StageOutput
from worker.loading import TorchSpanLoader
from worker.numerics import isa
from worker.server import StageServer
from worker.sharing import holders
from worker.sharing.shelf import Shelf

LOOPBACK = "127.0.0.1"
START_SECONDS = 120.0  # a busy machine imports torch for a minute
STOP_SECONDS = 30.0
MEMORY_BYTES = 1 << 30
KV_BYTES = 64 << 20
CPU = torch.device("cpu")
PROJECT = Path(__file__).parents[2]

Certify = Callable[[str], Credentials | None]
"""Gives a process its credentials, by name; None for plaintext."""


def plaintext(_name: str) -> None:
    """No credentials."""


def mutual_tls() -> Certify:
    """Return a Certify of one authority."""
    authority = CertificateAuthority.create()

    def certify(name: str) -> Credentials:
        request = SigningRequest.create(name, addresses=(LOOPBACK,))
        return request.credentials(authority.sign(request.pem), authority.certificate)

    return certify


class NewLoader(Protocol):
    """Makes the span loader of the worker with this number."""

    def __call__(self, number: int, credentials: Credentials | None, shelf: Shelf) -> SpanLoader: ...


def torch_loader(number: int, credentials: Credentials | None, shelf: Shelf) -> TorchSpanLoader:  # noqa: ARG001
    """The real one."""
    connect = partial(checkpoint_client.connect, credentials=credentials)
    return TorchSpanLoader(CPU, connect, shelf, partial(holders.connect, credentials=credentials))


class WatchedLoader:
    """The real loader, whose spans call `on_execute(stage, header)` in the compute thread before they compute a step.
    It may block or raise."""

    def __init__(self, number: int, credentials: Credentials | None, shelf: Shelf, on_execute: OnExecute) -> None:
        self._loader = torch_loader(number, credentials, shelf)
        self._on_execute = on_execute

    def measure(self, config: Mapping[str, Any]) -> ModelSizes:
        return self._loader.measure(config)

    def load(self, order: LoadOrder, on_progress: Callable[[LoadProgress], None]) -> LoadedSpan:
        loaded = self._loader.load(order, on_progress)
        return replace(loaded, executor=WatchedExecutor(loaded.executor, partial(self._on_execute, order.stage)))


class WatchedExecutor:
    """An executor that tells of every step before it computes it."""

    def __init__(self, executor: Executor, on_execute: Callable[[StepHeader], None]) -> None:
        self._executor = executor
        self._on_execute = on_execute

    @property
    def num_blocks(self) -> int:
        return self._executor.num_blocks

    def execute(
        self, header: StepHeader, tensors: Mapping[str, torch.Tensor], on_block: Callable[[int], None]
    ) -> StageOutput:
        self._on_execute(header)
        return self._executor.execute(header, tensors, on_block)

    def open_epoch(self) -> None:
        self._executor.open_epoch()

    def close(self) -> None:
        self._executor.close()


def new_stage_server(
    number: int, new_loader: NewLoader = torch_loader, credentials: Credentials | None = None
) -> StageServer:
    """Return worker `w<number>` of one thread, not started yet."""
    shelf = Shelf()
    info = WorkerInfo(
        worker_id=WorkerId(f"w{number}"),
        node_name=f"node-{number}",
        address="",
        device="cpu",
        device_name="cpu",
        num_threads=1,
        free_memory_bytes=MEMORY_BYTES,
        total_memory_bytes=MEMORY_BYTES,
        isa=isa(CPU),
        process_id=os.getpid(),
        versions=(),
    )
    return StageServer(
        info,
        new_loader(number, credentials, shelf),
        host=LOOPBACK,
        ports=range(0),
        credentials=credentials,
        clock=SystemClock(),
        prepare_thread=lambda: torch.set_num_threads(1),
        shelf=shelf,
    )


@asynccontextmanager
async def worker_here(
    number: int, new_loader: NewLoader = torch_loader, credentials: Credentials | None = None
) -> AsyncIterator[str]:
    """Run a worker in this process; give its address."""
    server = new_stage_server(number, new_loader, credentials)
    try:
        yield await server.start()
    finally:
        await server.stop()


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    """A worker in a process of its own."""

    process: asyncio.subprocess.Process
    address: str


@asynccontextmanager
async def worker_process(number: int, variables: Mapping[str, str] | None = None) -> AsyncIterator[WorkerProcess]:
    """Run a worker in a process of its own, with these environment variables besides the test's."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.integration.worker_process", str(number)),
        cwd=PROJECT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(variables or {})},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(START_SECONDS):
            line = await process.stdout.readline()
        yield WorkerProcess(process, json.loads(line)["address"])
    finally:
        await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Let a process end by itself, as it does once its input ends; kill it when it does not."""
    try:
        async with asyncio.timeout(STOP_SECONDS):
            await process.communicate(b"")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@dataclass(frozen=True, slots=True)
class LocalCluster:
    """A running server."""

    address: str
    coordinator: Coordinator
    spec: ModelSpec

    def client(self, **options: Any) -> AsyncClient:
        """Return a client that takes the first answer: none of its calls is tried again."""
        return AsyncClient(self.address, retry=RetryPolicy(max_attempts=1), **options)

    async def wait_ready(self) -> None:
        """Return when it is ready. Raises StageUnavailableError with the reason when it cannot be brought up."""
        ended = asyncio.create_task(self.coordinator.wait_ended())
        ready = asyncio.create_task(_watch_health(self.address))
        try:
            async with asyncio.timeout(START_SECONDS):
                await asyncio.wait((ended, ready), return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                raise StageUnavailableError(f"not brought up: {ended.result()}")
            await ready
        finally:
            ended.cancel()
            ready.cancel()
            await asyncio.gather(ended, ready, return_exceptions=True)

    async def wait_until_pages_are_free(self, client: AsyncClient) -> None:
        """Return when no sequence holds a page. Raises TimeoutError."""
        async with asyncio.timeout(STOP_SECONDS):
            while (status := await client.describe()).num_free_pages < status.num_pages:
                pass  # every answer took a turn of the server's loop


@asynccontextmanager
async def serving(model: str | Path, addresses: Sequence[str], **options: Any) -> AsyncIterator[LocalCluster]:
    """Serve a model on running workers, ready. `options` are those of `starting`."""
    async with starting(model, addresses, **options) as cluster:
        await cluster.wait_ready()
        yield cluster


@asynccontextmanager
async def starting(
    model: str | Path,
    addresses: Sequence[str],
    *,
    spec: ModelSpec | None = None,
    certify: Certify = plaintext,
    generation: int = 1,
    token: str = "",
    **settings: Any,
) -> AsyncIterator[LocalCluster]:
    """Begin to serve a model on running workers. `settings` are fields of ServeConfig."""
    spec = spec or resolve(str(model))
    config = ServeConfig(
        model=str(model), workers=len(addresses), port=0, **{"precision": "fp32", "kv_memory": KV_BYTES, **settings}
    )
    order = CoordinatorOrder(config, spec, tuple(addresses), LOOPBACK, generation, token)
    coordinator = Coordinator(order, certify("head"), SystemClock())
    address = await coordinator.start()
    try:
        yield LocalCluster(address, coordinator, spec)
    finally:
        async with asyncio.timeout(STOP_SECONDS):
            await coordinator.stop()


@asynccontextmanager
async def local_cluster(
    model: str | Path, num_stages: int = 3, *, new_loader: NewLoader = torch_loader, **options: Any
) -> AsyncIterator[LocalCluster]:
    """Serve a model with workers in this process. `options` are those of `serving`."""
    certify = options.get("certify", plaintext)
    async with AsyncExitStack() as stack:
        workers = [worker_here(number, new_loader, certify(f"node-{number}")) for number in range(num_stages)]
        addresses = [await stack.enter_async_context(worker) for worker in workers]
        yield await stack.enter_async_context(serving(model, addresses, **options))


async def _watch_health(address: str) -> None:
    """Return once the server's health is SERVING."""
    async with client_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=HEALTH_NAME))
        async for response in watch:
            if response.status == health_pb2.HealthCheckResponse.SERVING:
                return

"""Stage servers on loopback with fake spans, and the part of a coordinator that drives them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from cluster.clock import SystemClock
from cluster.load_order import LoadOrder
from cluster.microbatch import Epoch, StepFailure, StepHeader, StepId, StepProgress, StepResult
from cluster.model_spec import FolderSource, Precision
from cluster.placement import WorkerId, WorkerInfo
from cluster.request import SequenceId
from cluster.rpc.v1 import stage_service_pb2 as service
from cluster.rpc.v1 import stage_service_pb2_grpc as service_grpc
from cluster.span import Span
from cluster.testing.executor import FakeSpanLoader
from cluster.wire.channels import open_channel
from cluster.wire.steps import (
    epoch_to_proto,
    failure_from_proto,
    header_to_proto,
    progress_from_proto,
    result_from_proto,
)
from cluster.wire.tls import Credentials
from cluster.wire.workers import load_order_to_proto
from worker.server import StageServer

BLOCKS_PER_STAGE = 2
FIRST = Epoch(1, 1)
SECOND = Epoch(1, 2)


def worker_info(stage: int) -> WorkerInfo:
    """Return what the worker of a stage says about itself; the server adds its address."""
    return WorkerInfo(WorkerId(f"w{stage}"), f"node-{stage}", "", "cpu", "fake", 1, 1 << 30, 1 << 31, "none", 4242, ())


def load_order(stage: int, num_stages: int) -> LoadOrder:
    """Return an order for two blocks per stage."""
    return LoadOrder(
        stage=stage,
        num_stages=num_stages,
        span=Span(stage * BLOCKS_PER_STAGE, (stage + 1) * BLOCKS_PER_STAGE),
        config={"n_layer": num_stages * BLOCKS_PER_STAGE},
        source=FolderSource("/nowhere", "0"),
        checkpoint_service="",
        weight_files=(),
        weight_map={},
        precision=Precision.FP32,
        kv_dtype="auto",
        wire_dtype="auto",
        num_pages=4,
        page_size=64,
        max_context=256,
        is_exact=False,
    )


def step(
    step_id: int, *token_ids: int, epoch: Epoch = FIRST, last_stage: int = 2, deadline_ms: int = 60_000
) -> StepHeader:
    """Return a decode step of one token per sequence."""
    num_slices = len(token_ids)
    return StepHeader(
        epoch=epoch,
        step_id=StepId(step_id),
        deadline_ms=deadline_ms,
        sequence_ids=tuple(SequenceId(i) for i in range(num_slices)),
        start_positions=(0,) * num_slices,
        lengths=(1,) * num_slices,
        token_ids=token_ids,
        logits_rows=(1,) * num_slices,
        is_sampled=(True,) * num_slices,
        last_stage=last_stage,
    )


def prompt_step(step_id: int, num_tokens: int, *, last_stage: int = 2) -> StepHeader:
    """Return a step of one long prompt, token ids counting from 0."""
    return StepHeader(
        epoch=FIRST,
        step_id=StepId(step_id),
        deadline_ms=60_000,
        sequence_ids=(SequenceId(0),),
        start_positions=(0,),
        lengths=(num_tokens,),
        token_ids=tuple(range(num_tokens)),
        logits_rows=(1,),
        is_sampled=(True,),
        last_stage=last_stage,
    )


Report = StepResult | StepFailure | StepProgress


class StageCaller:
    """One worker as a coordinator sees it."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.stub = service_grpc.StageServiceStub(channel)
        self.watching: Any = None
        self._forward: Any = None

    async def load(self, stage: int, num_stages: int, epoch: Epoch = FIRST) -> list[service.LoadSpanResponse]:
        """Load a fake span; return what was told meanwhile."""
        return [told async for told in self.stub.LoadSpan(load_order_to_proto(load_order(stage, num_stages), epoch))]

    async def open_epoch(self, epoch: Epoch, next_address: str = "", next_node: str = "") -> None:
        """Open an epoch."""
        request = service.OpenEpochRequest(
            epoch=epoch_to_proto(epoch), next_address=next_address, next_node_name=next_node
        )
        await self.stub.OpenEpoch(request)

    def watch(self, epoch: Epoch = FIRST) -> None:
        """Begin to read reports."""
        self.watching = self.stub.Watch(service.WatchRequest(epoch=epoch_to_proto(epoch)))

    async def report(self) -> Report:
        """Return the next report."""
        response = await self.watching.read()
        assert response is not grpc.aio.EOF
        if response.WhichOneof("event") == "result":
            return result_from_proto(response.result)
        if response.WhichOneof("event") == "failure":
            return failure_from_proto(response.failure)
        return progress_from_proto(response.progress)

    async def send(self, *messages: service.ForwardRequest | StepHeader) -> None:
        """Send steps, or messages that make none, over this caller's stream."""
        self._forward = self._forward or self.stub.Forward()
        for message in messages:
            if isinstance(message, StepHeader):
                message = service.ForwardRequest(header=header_to_proto(message))
            await self._forward.write(message)

    async def acknowledged(self) -> int:
        """Return the next acknowledged step; raises AioRpcError when the stream was refused."""
        response = await self._forward.read()
        return int(response.step_id)

    def hang_up(self) -> None:
        """Break the stream of steps."""
        self._forward.cancel()
        self._forward = None


@dataclass
class Stages:
    """A pipeline of stage servers in this process."""

    servers: list[StageServer]
    addresses: list[str]
    callers: list[StageCaller]
    loader: FakeSpanLoader

    async def open(self, epoch: Epoch = FIRST) -> None:
        """Open an epoch on all stages at once and watch them."""
        nexts = [(address, f"node-{i + 1}") for i, address in enumerate(self.addresses[1:])] + [("", "")]
        await asyncio.gather(*(c.open_epoch(epoch, *n) for c, n in zip(self.callers, nexts, strict=True)))
        for caller in self.callers:
            caller.watch(epoch)


@asynccontextmanager
async def serving(
    num_stages: int = 3, loader: FakeSpanLoader | None = None, credentials: Credentials | None = None
) -> AsyncIterator[Stages]:
    """Run stage servers that have loaded nothing yet."""
    loader = loader or FakeSpanLoader()
    servers = [
        StageServer(
            worker_info(i), loader, host="127.0.0.1", ports=range(0), credentials=credentials, clock=SystemClock()
        )
        for i in range(num_stages)
    ]
    async with AsyncExitStack() as stack:
        addresses = []
        for server in servers:
            addresses.append(await server.start())
            stack.push_async_callback(server.stop)
        channels = [await stack.enter_async_context(open_channel(address, credentials)) for address in addresses]
        yield Stages(servers, addresses, [StageCaller(channel) for channel in channels], loader)


@asynccontextmanager
async def pipeline(
    num_stages: int = 3, loader: FakeSpanLoader | None = None, credentials: Credentials | None = None
) -> AsyncIterator[Stages]:
    """Run stage servers with spans loaded and the first epoch open."""
    async with serving(num_stages, loader, credentials) as stages:
        await asyncio.gather(*(caller.load(i, num_stages) for i, caller in enumerate(stages.callers)))
        await stages.open()
        yield stages


def step_ids(reports: Sequence[Report]) -> list[int]:
    """Return the reports' step ids."""
    return [report.step_id for report in reports]


async def until(predicate: Callable[[], bool]) -> None:
    """Let the event loop turn until what another thread or the server does has happened."""
    while not predicate():  # noqa: ASYNC110  # it may be set by a thread
        await asyncio.sleep(0.001)

"""One worker's stage service, as the coordinator calls it. Covers calls and their deadlines; no decision.

Every method raises SpanwiseError: foreign exceptions stop here.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import grpc

from cluster.errors import (
    ConfigurationError,
    IncompatibleVersionError,
    StageTimeoutError,
    StageUnavailableError,
    StorageError,
)
from cluster.load_order import LoadedReport, LoadOrder, LoadProgress
from cluster.microbatch import Epoch
from cluster.model_spec import ModelSizes
from cluster.placement import WorkerInfo
from cluster.rpc.v1 import stage_service_pb2 as service
from cluster.rpc.v1 import stage_service_pb2_grpc as service_grpc
from cluster.version import PROTOCOL_VERSION, VERSION
from cluster.wire.channels import open_channel
from cluster.wire.status import from_rpc_error, is_worded
from cluster.wire.steps import epoch_to_proto
from cluster.wire.tls import Credentials
from cluster.wire.workers import (
    load_order_to_proto,
    load_progress_from_proto,
    loaded_report_from_proto,
    model_sizes_from_proto,
    worker_info_from_proto,
)

HELLO_SECONDS = 30.0
MEASURE_SECONDS = 120.0
OPEN_EPOCH_SECONDS = 15.0
FIREWALL_ADVICE = (
    "; let its port through the firewall (--stage-ports fixes the range), or choose the network that joins them "
    "with --interface"
)


class StageLink:
    """A channel to one worker."""

    def __init__(self, address: str, credentials: Credentials | None, node_name: str = "") -> None:
        """`node_name` names the worker's machine for a person."""
        self.address = address
        self._name = f"worker at {address}" + (f" on {node_name}" if node_name else "")
        self._channel = open_channel(address, credentials)
        self.stub = service_grpc.StageServiceStub(self._channel)

    async def hello(self) -> WorkerInfo:
        """Exchange versions; the answer's address is replaced by the one that was dialled."""
        request = service.HelloRequest(protocol_version=PROTOCOL_VERSION, version=VERSION)
        async with _translated(self._name, advice=FIREWALL_ADVICE):
            response = await self.stub.Hello(request, timeout=HELLO_SECONDS, wait_for_ready=True)
        return worker_info_from_proto(response)

    async def measure(self, config: Mapping[str, Any]) -> ModelSizes:
        """Count a model's parameters on the worker."""
        request = service.MeasureModelRequest(config_json=json.dumps(dict(config)))
        async with _translated(self._name):
            response = await self.stub.MeasureModel(request, timeout=MEASURE_SECONDS)
        return model_sizes_from_proto(response)

    async def load(
        self,
        order: LoadOrder,
        epoch: Epoch,
        on_progress: Callable[[LoadProgress], None],
        *,
        stall_seconds: float,
    ) -> LoadedReport:
        """Load a span; StageTimeoutError when it makes no progress for `stall_seconds`."""
        where = f"stage {order.stage} ({self._name}, blocks {order.span})"
        async with _translated(where):
            call = self.stub.LoadSpan(load_order_to_proto(order, epoch))
            try:
                return await _loaded(call, on_progress, stall_seconds, where)
            finally:
                call.cancel()  # of no effect once it has ended

    async def open_epoch(self, epoch: Epoch, next_address: str, next_node_name: str) -> None:
        """Open an epoch on this stage, which connects it to the next one."""
        request = service.OpenEpochRequest(
            epoch=epoch_to_proto(epoch), next_address=next_address, next_node_name=next_node_name
        )
        async with _translated(self._name):
            await self.stub.OpenEpoch(request, timeout=OPEN_EPOCH_SECONDS)

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()


async def _loaded(
    call: Any, on_progress: Callable[[LoadProgress], None], stall_seconds: float, where: str
) -> LoadedReport:
    latest: LoadProgress | None = None
    try:
        async with asyncio.timeout(stall_seconds) as stall:
            while (response := await call.read()) is not grpc.aio.EOF:
                if response.is_loaded:
                    return loaded_report_from_proto(response)
                progress = load_progress_from_proto(response)
                on_progress(progress)
                if progress != latest:  # a worker that lives repeats itself: only progress counts
                    latest = progress
                    stall.reschedule(asyncio.get_running_loop().time() + stall_seconds)
    except TimeoutError:
        raise StageTimeoutError(
            f"{where} made no progress in {stall_seconds:g} s of loading; see `cluster logs` (--load-timeout raises "
            "the limit)"
        ) from None
    raise StageUnavailableError(f"{where} ended its load without saying that it is loaded")


@asynccontextmanager
async def _translated(where: str, advice: str = "") -> AsyncIterator[None]:
    """Turn gRPC's errors into ours. Those of the connection, which no worker has worded, name both ends; those of the
    worker's machine name that."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        translated = from_rpc_error(error)
        if isinstance(translated, IncompatibleVersionError):
            raise IncompatibleVersionError(
                f"{where} does not understand {socket.gethostname()}: {translated}"
            ) from None
        is_unheard = isinstance(translated, StageUnavailableError | StageTimeoutError) and not is_worded(error)
        if is_unheard:
            message = f"{where} does not answer calls from {socket.gethostname()}: {translated}{advice}"
            raise type(translated)(message, reason=translated.reason) from None
        if isinstance(translated, ConfigurationError | StorageError):  # of its machine: say which
            raise type(translated)(f"{where}: {translated}", reason=translated.reason) from None
        raise translated from None

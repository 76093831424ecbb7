"""A worker's gRPC server: the stage service, health and reflection, over one compute thread. No Ray.

Covers calls, epochs' fencing and loading; a loaded span's steps are the relay's.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from cluster.clock import Clock
from cluster.errors import (
    ConfigurationError,
    IncompatibleVersionError,
    InvalidRequestError,
    NotReadyError,
    RequestCancelledError,
    StalePlacementError,
)
from cluster.load_order import LoadedReport, LoadProgress
from cluster.microbatch import Epoch, StepFailure, StepProgress, StepResult
from cluster.placement import WorkerInfo
from cluster.rpc.v1 import stage_service_pb2 as service
from cluster.rpc.v1 import stage_service_pb2_grpc as service_grpc
from cluster.version import PROTOCOL_VERSION, VERSION
from cluster.wire.channels import bind, new_server
from cluster.wire.status import abort_with
from cluster.wire.steps import (
    epoch_from_proto,
    epoch_to_proto,
    failure_to_proto,
    header_from_proto,
    progress_to_proto,
    result_to_proto,
)
from cluster.wire.tensors import PayloadAssembler
from cluster.wire.tls import Credentials
from cluster.wire.workers import (
    load_order_from_proto,
    load_progress_to_proto,
    loaded_report_to_proto,
    model_sizes_to_proto,
    worker_info_to_proto,
)
from worker.compute_thread import ComputeThread
from worker.downstream import Downstream
from worker.executor import LoadedSpan, SpanLoader
from worker.relay import ReceivedStep, Relay
from worker.sharing.service import StoreServicer
from worker.sharing.shelf import Shelf

logger = logging.getLogger(__name__)

HEALTH_NAME = "cluster.rpc.v1.StageService"
LOAD_HEARTBEAT_SECONDS = 0.5
STOP_SECONDS = 3.0


class StageServer(service_grpc.StageServiceServicer):
    """Serves one worker. Construct, `await start()`, `await stop()`, all on one event loop."""

    def __init__(
        self,
        info: WorkerInfo,
        loader: SpanLoader,
        *,
        host: str,
        ports: range,
        credentials: Credentials | None,
        clock: Clock,
        prepare_thread: Callable[[], None] = lambda: None,
        shelf: Shelf | None = None,
    ) -> None:
        """`info.address` is set by `start`. An empty `ports` means any free port. `prepare_thread` runs first in the
        compute thread. `shelf` is what the loader offers to other workers."""
        self._info = info
        self._loader = loader
        self._host, self._ports, self._credentials = host, ports, credentials
        self._clock = clock
        self._prepare_thread = prepare_thread
        self._shelf = shelf or Shelf()
        self._newest = Epoch(0, 0)
        self._relay: Relay | None = None
        self._is_stopping = False
        self._changing = asyncio.Lock()  # one load or epoch change at a time

    async def start(self) -> str:
        """Listen; return the host:port that neighbours dial. Raises ConfigurationError when no port is free."""
        self._server = new_server()
        self._health = HealthServicer()
        service_grpc.add_StageServiceServicer_to_server(self, self._server)
        service_grpc.add_StoreServiceServicer_to_server(StoreServicer(self._shelf), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((HEALTH_NAME, reflection.SERVICE_NAME), self._server)
        try:
            port = bind(self._server, self._host, self._ports, self._credentials)
        except ConfigurationError:
            await self._server.stop(None)
            raise
        self._compute = ComputeThread(f"compute-{self._info.worker_id}", self._prepare_thread)
        await self._server.start()
        self._info = replace(self._info, address=f"{self._host}:{port}")
        self._shelf.address = self._info.address
        await self._set_health(is_serving=False)
        return self._info.address

    async def stop(self) -> None:
        """Stop serving and free everything; a load under way is abandoned. Idempotent, also before `start`."""
        if self._is_stopping or not self._info.address:
            return
        self._is_stopping = True
        if self._relay is not None:
            await self._relay.close()
        await self._server.stop(None)
        await self._compute.stop(STOP_SECONDS)
        self._relay = None

    # --- calls -------------------------------------------------------------------------------------------------------

    async def Hello(self, request: service.HelloRequest, context: Any) -> service.HelloResponse:  # noqa: N802
        if request.protocol_version != PROTOCOL_VERSION:
            message = (
                f"worker {self._info.worker_id} on {self._info.node_name} speaks protocol {PROTOCOL_VERSION} (spanwise "
                f"{VERSION}), the caller protocol {request.protocol_version} (spanwise {request.version}): install one "
                "version on all nodes"
            )
            await abort_with(context, IncompatibleVersionError(message))
        return worker_info_to_proto(self._info)

    async def MeasureModel(  # noqa: N802
        self, request: service.MeasureModelRequest, context: Any
    ) -> service.MeasureModelResponse:
        try:
            sizes = await self._compute.run(lambda: self._loader.measure(json.loads(request.config_json)))
        except Exception as error:  # told to the caller, typed or as our bug
            await abort_with(context, error)
        return model_sizes_to_proto(sizes)

    async def LoadSpan(  # noqa: N802
        self, request: service.LoadSpanRequest, context: Any
    ) -> AsyncIterator[service.LoadSpanResponse]:
        try:
            self._fence(epoch_from_proto(request.epoch))  # before waiting: it ends a load of an older epoch
            async with self._changing:
                self._fence(epoch_from_proto(request.epoch))
                await self._unload()
                async for response in self._load(request):
                    yield response
        except Exception as error:  # likewise
            await abort_with(context, error)

    async def OpenEpoch(self, request: service.OpenEpochRequest, context: Any) -> service.OpenEpochResponse:  # noqa: N802
        try:
            async with self._changing:
                await self._open_epoch(request)
        except Exception as error:  # likewise
            await abort_with(context, error)
        return service.OpenEpochResponse()

    async def Forward(  # noqa: N802
        self, request_iterator: AsyncIterator[service.ForwardRequest], context: Any
    ) -> AsyncIterator[service.ForwardResponse]:
        try:
            async for step in _steps(request_iterator, self._clock):
                await self._loaded().accept(step)  # asked for every time: a stream must not keep a replaced span alive
                header = step.header
                yield service.ForwardResponse(epoch=epoch_to_proto(header.epoch), step_id=header.step_id)
        except InvalidRequestError as error:
            if self._relay is not None:
                self._relay.refuse(error)
            await abort_with(context, error)
        except Exception as error:  # likewise; the sender reports its steps as lost
            await abort_with(context, error)

    async def Watch(  # noqa: N802
        self, request: service.WatchRequest, context: Any
    ) -> AsyncIterator[service.WatchResponse]:
        try:
            opened = self._loaded().check_epoch(epoch_from_proto(request.epoch))
            async for report in opened.reports.watch():
                yield _report_to_proto(report)
        except Exception as error:  # likewise
            await abort_with(context, error)

    # --- loading and epochs ------------------------------------------------------------------------------------------

    def _loaded(self) -> Relay:
        if self._relay is None:
            raise NotReadyError(f"worker {self._info.worker_id} on {self._info.node_name} has no span loaded")
        return self._relay

    def _fence(self, epoch: Epoch) -> None:
        if epoch < self._newest:
            raise StalePlacementError(f"worker {self._info.worker_id} is in epoch {self._newest}, the call in {epoch}")
        self._newest = epoch

    async def _unload(self) -> None:
        await self._set_health(is_serving=False)
        if self._relay is not None:
            relay, self._relay = self._relay, None
            await relay.close()
            del relay
            gc.collect()  # the old weights go before the new ones come: modules and tasks refer to each other

    async def _load(self, request: service.LoadSpanRequest) -> AsyncIterator[service.LoadSpanResponse]:
        """Load in the compute thread, repeating the latest progress at least every second."""
        order, epoch = load_order_from_proto(request), epoch_from_proto(request.epoch)
        latest = LoadProgress("loading", 0, 0)
        is_abandoned = False

        def note(progress: LoadProgress) -> None:
            nonlocal latest
            latest = progress
            if is_abandoned or self._is_stopping or epoch < self._newest:
                raise RequestCancelledError("the load was abandoned")

        load = asyncio.create_task(self._compute.run(lambda: self._loader.load(order, note)))
        try:
            while not (await asyncio.wait((load,), timeout=LOAD_HEARTBEAT_SECONDS))[0]:
                yield load_progress_to_proto(latest)
            loaded = await load
        finally:
            is_abandoned = True
            load.cancel()
        self._relay = Relay(order.stage, loaded.executor, self._compute, self._clock)
        logger.info("stage %s holds blocks %s: %s bytes", order.stage, order.span, loaded.weight_bytes)
        yield loaded_report_to_proto(_report_of(loaded))

    async def _open_epoch(self, request: service.OpenEpochRequest) -> None:
        epoch = epoch_from_proto(request.epoch)
        self._fence(epoch)
        relay = self._loaded()
        if relay.epoch == epoch:
            return
        await relay.close_epoch()
        downstream = None
        if request.next_address:
            follower = f"stage {relay.stage + 1} on {request.next_node_name}"
            downstream = Downstream(request.next_address, follower, self._credentials, self._clock)
            here = f"stage {relay.stage} on {self._info.node_name} ({self._info.address})"
            try:
                await downstream.connect(here)
            except BaseException:
                await downstream.close()
                raise
        await relay.open_epoch(epoch, downstream)
        await self._set_health(is_serving=True)

    async def _set_health(self, *, is_serving: bool) -> None:
        response = health_pb2.HealthCheckResponse
        status = response.SERVING if is_serving else response.NOT_SERVING
        for name in ("", HEALTH_NAME):
            await self._health.set(name, status)


def _report_of(loaded: LoadedSpan) -> LoadedReport:
    return LoadedReport(
        loaded.weight_bytes,
        loaded.kv_bytes,
        loaded.compute_dtype,
        loaded.wire_dtype,
        loaded.kv_dtype,
        loaded.streamed_bytes,
        loaded.disk_bytes_per_second,
        loaded.is_exact,
    )


def _report_to_proto(report: StepResult | StepFailure | StepProgress) -> service.WatchResponse:
    if isinstance(report, StepResult):
        return service.WatchResponse(result=result_to_proto(report))
    if isinstance(report, StepFailure):
        return service.WatchResponse(failure=failure_to_proto(report))
    return service.WatchResponse(progress=progress_to_proto(report))


async def _steps(messages: AsyncIterator[service.ForwardRequest], clock: Clock) -> AsyncIterator[ReceivedStep]:
    """Put a stream's messages together to steps. Raises InvalidRequestError for messages in no sensible order."""
    header, payload, arrived = None, None, 0.0
    async for message in messages:
        if message.HasField("header"):
            if header is not None:
                raise InvalidRequestError(f"step {header.step_id} was cut short by the next header")
            header, payload, arrived = header_from_proto(message.header), PayloadAssembler(message.tensors), clock.now()
        if header is None or payload is None:
            raise InvalidRequestError("a piece came before any header")
        if message.HasField("piece"):
            payload.add(message.piece)
        if payload.is_complete:
            yield ReceivedStep(header, payload.tensors(), payload.num_bytes, arrived, clock.now())
            header, payload = None, None

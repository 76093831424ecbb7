"""The client-facing gRPC service: protobuf in, protobuf out. Decides nothing; the engine and the tokenizer do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Protocol

from cluster.errors import SpanwiseError
from cluster.request import RequestId
from cluster.rpc.v1 import generation_service_pb2 as service
from cluster.rpc.v1 import generation_service_pb2_grpc as service_grpc
from cluster.wire.status import abort_with
from coordinator.board import StatusBoard
from coordinator.engine import Engine
from coordinator.intake import Intake
from coordinator.streams import RequestStream

HEARTBEAT_SECONDS = 10.0
"""Longest silence on a stream: below the 15 s that the schema promises and the minute at which proxies cut."""


class Backend(Protocol):
    """What serves the requests: `coordinator.coordinator.Coordinator`."""

    board: StatusBoard

    def engine(self) -> Engine:
        """Return the engine, or raise NotReadyError or StageUnavailableError."""
        ...

    def describe(self) -> service.DescribeClusterResponse:
        """Return state, stages and load."""
        ...


class GenerationServicer(service_grpc.GenerationServiceServicer):
    """Implements GenerationService."""

    def __init__(self, backend: Backend, intake: Intake) -> None:
        self._backend = backend
        self._intake = intake

    async def Generate(  # noqa: N802
        self, request: service.GenerateRequest, context: Any
    ) -> AsyncIterator[service.GenerateResponse]:
        """Admit, then relay the request's events; a client that goes away aborts it."""
        engine: Engine | None = None
        stream: RequestStream | None = None
        try:
            self._backend.engine()  # before the work of tokenizing
            tokenized = await asyncio.to_thread(self._intake.read, request)
            engine = self._backend.engine()
            stream = engine.submit(tokenized)
            async for response in _with_heartbeat(engine, stream):
                yield response
        except SpanwiseError as error:
            await abort_with(context, error)
        finally:
            if engine is not None and stream is not None:
                engine.abandon(stream)

    async def Abort(self, request: service.AbortRequest, context: Any) -> service.AbortResponse:  # noqa: N802
        try:
            self._backend.engine().abort(RequestId(request.request_id))
        except SpanwiseError as error:
            await abort_with(context, error)
        return service.AbortResponse()

    async def Tokenize(self, request: service.TokenizeRequest, context: Any) -> service.TokenizeResponse:  # noqa: N802
        try:
            token_ids, text = await asyncio.to_thread(self._intake.tokenize, request)
        except SpanwiseError as error:
            await abort_with(context, error)
        return service.TokenizeResponse(token_ids=token_ids, text=text)

    async def Detokenize(  # noqa: N802
        self, request: service.DetokenizeRequest, context: Any
    ) -> service.DetokenizeResponse:
        try:
            text = await asyncio.to_thread(self._intake.detokenize, request)
        except SpanwiseError as error:
            await abort_with(context, error)
        return service.DetokenizeResponse(text=text)

    async def ListModels(  # noqa: N802
        self,
        request: service.ListModelsRequest,  # noqa: ARG002
        context: Any,  # noqa: ARG002
    ) -> service.ListModelsResponse:
        return service.ListModelsResponse(models=[self._backend.board.model()])

    async def DescribeCluster(  # noqa: N802
        self,
        request: service.DescribeClusterRequest,  # noqa: ARG002
        context: Any,  # noqa: ARG002
    ) -> service.DescribeClusterResponse:
        return self._backend.describe()


async def _with_heartbeat(engine: Engine, stream: RequestStream) -> AsyncIterator[service.GenerateResponse]:
    """Yield the stream's events, and progress whenever it would be silent for too long. Ends after Finished."""
    while True:
        try:
            async with asyncio.timeout(HEARTBEAT_SECONDS):
                response = await stream.next()
        except TimeoutError:
            if not stream.is_ended:  # its last messages may have come in the same moment
                yield service.GenerateResponse(progress=engine.progress_of(stream))
            continue
        yield response
        if response.HasField("finished"):
            return

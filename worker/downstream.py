"""The long-lived stream to the next stage: steps leave in order while the next one is computed.

Covers one epoch's stream. What happens when it breaks is the relay's decision.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import grpc

from cluster.clock import Clock
from cluster.errors import IncompatibleVersionError, SpanwiseError, StageUnavailableError
from cluster.microbatch import StepHeader
from cluster.rpc.v1 import stage_service_pb2 as service
from cluster.rpc.v1 import stage_service_pb2_grpc as service_grpc
from cluster.version import PROTOCOL_VERSION, VERSION
from cluster.wire.channels import open_channel
from cluster.wire.status import as_spanwise_error
from cluster.wire.steps import header_to_proto
from cluster.wire.tensors import pieces_of, specs_to_proto
from cluster.wire.tls import Credentials

if TYPE_CHECKING:
    from torch import Tensor

CONNECT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class OutgoingStep:
    """A step on its way out. `expires` is in clock seconds: the header gets what is left when it is written."""

    header: StepHeader
    tensors: Mapping[str, Tensor]
    expires: float


class Downstream:
    """Sends steps to the next stage of one epoch."""

    def __init__(self, address: str, description: str, credentials: Credentials | None, clock: Clock) -> None:
        """`description` names the next stage and its node for a person."""
        self._clock = clock
        self._description = description
        self._address = address
        self._channel = open_channel(address, credentials)
        self._stub = service_grpc.StageServiceStub(self._channel)
        self._outgoing: asyncio.Queue[OutgoingStep] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    async def connect(self, here: str) -> None:
        """Wait until the next stage answers. Raises StageUnavailableError naming both nodes, address and port."""
        request = service.HelloRequest(protocol_version=PROTOCOL_VERSION, version=VERSION)
        try:
            await self._stub.Hello(request, timeout=CONNECT_SECONDS, wait_for_ready=True)
        except grpc.aio.AioRpcError as error:
            known = as_spanwise_error(error)
            if isinstance(known, IncompatibleVersionError):
                raise IncompatibleVersionError(
                    f"{self._description} at {self._address} does not understand {here}: {known}"
                ) from None
            raise StageUnavailableError(
                f"{here} cannot reach {self._description} at {self._address} within "
                f"{CONNECT_SECONDS:g} s: let its port through the firewall (--stage-ports fixes the range), or choose "
                "the network that joins them with --interface"
            ) from None

    def open(self, on_broken: Callable[[SpanwiseError], None]) -> None:
        """Start sending; `on_broken` is called if the stream ends before `close`, with the reason."""
        self._task = asyncio.create_task(self._run(on_broken))

    def send(self, step: OutgoingStep) -> None:
        """Queue a step. The coordinator bounds how many are under way."""
        self._outgoing.put_nowait(step)

    async def close(self) -> None:
        """End the stream."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._channel.close()

    async def _run(self, on_broken: Callable[[SpanwiseError], None]) -> None:
        call = self._stub.Forward()
        writer = asyncio.create_task(self._write(call, on_broken))
        try:
            async for _ in call:
                pass  # acknowledged; the step's fate is told to the coordinator by whoever decides it
            on_broken(StageUnavailableError(f"{self._name()} closed the stream"))
        except grpc.aio.AioRpcError as error:
            known = as_spanwise_error(error)
            on_broken(type(known)(f"{self._name()}: {known}", reason=known.reason))
        finally:
            call.cancel()
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    async def _write(self, call: Any, on_broken: Callable[[SpanwiseError], None]) -> None:
        try:
            while True:
                step = await self._outgoing.get()
                left_ms = max(0, int((step.expires - self._clock.now()) * 1000))
                for message in _messages(replace(step.header, deadline_ms=left_ms), step.tensors):
                    await call.write(message)
        except (grpc.aio.AioRpcError, grpc.aio.InternalError, asyncio.InvalidStateError):
            pass  # the stream broke: its reading end says why
        except Exception as error:  # a step that cannot be put into messages must not vanish
            on_broken(as_spanwise_error(error))

    def _name(self) -> str:
        return f"{self._description} at {self._address}"


def _messages(header: StepHeader, tensors: Mapping[str, Tensor]) -> Iterator[service.ForwardRequest]:
    """Yield a step's messages: the header with the first piece, then the other pieces."""
    pieces = pieces_of(tensors)
    first = next(pieces, None)
    yield service.ForwardRequest(header=header_to_proto(header), tensors=specs_to_proto(tensors), piece=first)
    for piece in pieces:
        yield service.ForwardRequest(piece=piece)

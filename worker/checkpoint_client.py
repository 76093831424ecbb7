"""Reads byte ranges of a checkpoint folder that only the head has, from the coordinator's CheckpointService."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import grpc

from cluster.errors import ConfigurationError
from cluster.rpc.v1.stage_service_pb2 import ReadRangeRequest
from cluster.rpc.v1.stage_service_pb2_grpc import CheckpointServiceStub
from cluster.wire.status import from_rpc_error

if TYPE_CHECKING:
    from cluster.wire.tls import Credentials

_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.keepalive_time_ms", 20_000),  # a coordinator whose machine is gone is noticed within the sum of the two
    ("grpc.keepalive_timeout_ms", 10_000),
)


class CheckpointReader(Protocol):
    """Where a remote checkpoint's bytes come from. Used from several threads at once."""

    def read(self, file: str, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes `[start, end)` of a file, in order, in pieces. Raises a SpanwiseError."""
        ...

    def close(self) -> None: ...


class CheckpointClient:
    """A CheckpointReader over gRPC. Owns its channel."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._stub = CheckpointServiceStub(channel)

    def read(self, file: str, start: int, end: int) -> Iterator[bytes]:
        """See CheckpointReader."""
        received = 0
        try:
            for response in self._stub.ReadRange(ReadRangeRequest(file=file, offset=start, length=end - start)):
                received += len(response.data)
                yield response.data
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        if received != end - start:
            raise ConfigurationError(
                f"the coordinator sent {received:,} of {end - start:,} bytes of {file}: keep the folder unchanged"
            )

    def close(self) -> None:
        self._channel.close()


def connect(address: str, credentials: Credentials | None = None) -> CheckpointClient:
    """Return a client of the service at host:port; without credentials it speaks plaintext."""
    if credentials is None:
        return CheckpointClient(grpc.insecure_channel(address, options=_OPTIONS))
    return CheckpointClient(grpc.secure_channel(address, credentials.channel(), options=_OPTIONS))

"""Serves byte ranges of a checkpoint folder that exists only on the head, for workers on other machines.

Covers reading; each worker decides which ranges its span needs (`worker.weights`). Serves the weight files of the
checkpoint and nothing else, whatever a request names.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

from cluster.errors import ConfigurationError, InvalidRequestError, NotFoundError, SpanwiseError
from cluster.rpc.v1 import stage_service_pb2 as service
from cluster.rpc.v1 import stage_service_pb2_grpc as service_grpc
from cluster.wire.status import abort_with

PIECE_BYTES = 1 << 20


class CheckpointServicer(service_grpc.CheckpointServiceServicer):
    """CheckpointService over one folder. Reads in threads, so that the loop never waits for a disk."""

    def __init__(self, folder: str, file_names: Iterable[str]) -> None:
        self._paths = {name: Path(folder, name) for name in file_names}

    async def ReadRange(  # noqa: N802 - gRPC's name
        self, request: service.ReadRangeRequest, context: Any
    ) -> AsyncIterator[service.ReadRangeResponse]:
        """Stream the range in order, in pieces of at most PIECE_BYTES."""
        try:
            async for data in self._pieces(request.file, request.offset, request.offset + request.length):
                yield service.ReadRangeResponse(data=data)
        except SpanwiseError as error:
            await abort_with(context, error)

    async def _pieces(self, name: str, start: int, end: int) -> AsyncIterator[bytes]:
        file = await asyncio.to_thread(self._open, name)
        try:
            size_bytes = os.fstat(file).st_size
            if end > size_bytes:
                raise InvalidRequestError(f"{name} has {size_bytes:,} bytes; there is no byte range {start:,}-{end:,}")
            while start < end:
                data = await asyncio.to_thread(os.pread, file, min(PIECE_BYTES, end - start), start)
                if not data:
                    raise ConfigurationError(f"{name} became shorter while it was read: keep the folder unchanged")
                yield data
                start += len(data)
        finally:
            os.close(file)

    def _open(self, name: str) -> int:
        if name not in self._paths:
            raise NotFoundError(f"{name!r} is not a weight file of the checkpoint served here")
        try:
            return os.open(self._paths[name], os.O_RDONLY)
        except OSError as error:
            raise ConfigurationError(f"cannot read {self._paths[name]}: {error.strerror}") from error

"""StoreService: other workers read what this one holds. Serves files that its shelf lists, and nothing else."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster.errors import InvalidRequestError, NotFoundError
from cluster.rpc.v1 import stage_pb2, stage_service_pb2_grpc
from cluster.rpc.v1 import stage_service_pb2 as service
from cluster.wire.status import abort_with
from worker.sharing.shelf import Shelf

PIECE_BYTES = 1 << 20


class StoreServicer(stage_service_pb2_grpc.StoreServiceServicer):
    """StoreService over one shelf. Reads in threads, so that the loop never waits for a disk."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf

    async def ListHeld(self, request: service.ListHeldRequest, context: Any) -> service.ListHeldResponse:  # noqa: N802
        try:
            return await asyncio.to_thread(self._list, request.collection)
        except Exception as error:  # told to the caller, typed or as our bug
            await abort_with(context, error)

    async def ReadHeld(  # noqa: N802
        self, request: service.ReadHeldRequest, context: Any
    ) -> AsyncIterator[service.ReadHeldResponse]:
        try:
            path = (await asyncio.to_thread(self._shelf.files, request.collection)).get(request.file)
            if path is None:
                raise NotFoundError(f"{request.file!r} of {request.collection} is not held here")
            async for data in _pieces(path, request.offset, request.offset + request.length):
                yield service.ReadHeldResponse(data=data)
        except FileNotFoundError:
            await abort_with(context, NotFoundError(f"{request.file!r} is no longer held here"))
        except Exception as error:  # likewise
            await abort_with(context, error)

    def _list(self, collection: str) -> service.ListHeldResponse:
        claims = self._shelf.claims(collection)
        return service.ListHeldResponse(
            files=_described(self._shelf.files(collection)),
            claims=[
                service.Claim(file=name, has_begun=claim.has_begun, bytes_done=claim.bytes_done)
                for name, claim in claims.items()
            ],
        )


def _described(files: Mapping[str, Path]) -> Iterator[stage_pb2.CheckpointFile]:
    for name, path in files.items():
        with suppress(FileNotFoundError):  # deleted since it was listed
            yield stage_pb2.CheckpointFile(name=name, size_bytes=path.stat().st_size)


async def _pieces(path: Path, start: int, end: int) -> AsyncIterator[bytes]:
    file = await asyncio.to_thread(os.open, path, os.O_RDONLY)
    try:
        while start < end:
            data = await asyncio.to_thread(os.pread, file, min(PIECE_BYTES, end - start), start)
            if not data:
                raise InvalidRequestError(f"{path.name} ends at byte {start:,}: there is no byte {end:,}")
            yield data
            start += len(data)
    finally:
        os.close(file)

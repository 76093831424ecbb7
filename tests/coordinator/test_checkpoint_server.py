from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from cluster.errors import ConfigurationError, InvalidRequestError, NotFoundError, SpanwiseError
from cluster.rpc.v1.stage_service_pb2 import ReadRangeRequest
from cluster.rpc.v1.stage_service_pb2_grpc import CheckpointServiceStub, add_CheckpointServiceServicer_to_server
from cluster.wire.status import from_rpc_error
from coordinator.checkpoint_server import PIECE_BYTES, CheckpointServicer

CONTENT = bytes(range(256)) * 10_000  # more than two pieces


@pytest.fixture
async def stub(tmp_path: Path) -> AsyncIterator[CheckpointServiceStub]:
    (tmp_path / "model.safetensors").write_bytes(CONTENT)
    (tmp_path / "secret.txt").write_text("not part of the checkpoint")
    server = grpc.aio.server()
    servicer = CheckpointServicer(str(tmp_path), ["model.safetensors", "gone.safetensors"])
    add_CheckpointServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield CheckpointServiceStub(channel)
    await server.stop(None)


async def read(stub: CheckpointServiceStub, file: str, offset: int, length: int) -> list[bytes]:
    request = ReadRangeRequest(file=file, offset=offset, length=length)
    return [response.data async for response in stub.ReadRange(request)]


async def failure(stub: CheckpointServiceStub, file: str, offset: int, length: int) -> SpanwiseError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read(stub, file, offset, length)
    return from_rpc_error(caught.value)


@pytest.mark.parametrize(("offset", "length"), [(0, len(CONTENT)), (5, 1), (7, PIECE_BYTES), (11, PIECE_BYTES + 1)])
async def test_range_arrives_in_pieces_of_bounded_size(stub: CheckpointServiceStub, offset: int, length: int) -> None:
    pieces = await read(stub, "model.safetensors", offset, length)
    assert b"".join(pieces) == CONTENT[offset : offset + length]
    assert all(0 < len(piece) <= PIECE_BYTES for piece in pieces)


async def test_empty_range_sends_nothing(stub: CheckpointServiceStub) -> None:
    assert await read(stub, "model.safetensors", 100, 0) == []


@pytest.mark.parametrize("name", ["secret.txt", "../secret.txt", "/etc/passwd", "./model.safetensors", ""])
async def test_only_weight_files_of_the_checkpoint_are_served(stub: CheckpointServiceStub, name: str) -> None:
    error = await failure(stub, name, 0, 1)
    assert isinstance(error, NotFoundError)
    assert "not a weight file" in error.message


@pytest.mark.parametrize(("offset", "length"), [(0, len(CONTENT) + 1), (len(CONTENT), 1), (2**63, 1), (0, 2**63)])
async def test_range_beyond_the_file_is_refused(stub: CheckpointServiceStub, offset: int, length: int) -> None:
    assert isinstance(await failure(stub, "model.safetensors", offset, length), InvalidRequestError)


async def test_file_that_vanished_is_named(stub: CheckpointServiceStub) -> None:
    error = await failure(stub, "gone.safetensors", 0, 1)
    assert isinstance(error, ConfigurationError)
    assert "gone.safetensors: No such file" in error.message

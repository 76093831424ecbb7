import asyncio
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from cluster.errors import ConfigurationError, IncompatibleVersionError
from cluster.version import PROTOCOL_VERSION
from cluster.wire.channels import PROTOCOL_KEY, bind, client_channel, new_server, open_channel
from cluster.wire.status import from_rpc_error

SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture
async def address():
    """A server with a health service, on a free port."""
    server = new_server()
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = bind(server, "127.0.0.1", range(0), None)
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


async def refusal_of(address: str, version: str) -> IncompatibleVersionError:
    """Return what a caller of another protocol version is told, by a unary call and by a stream."""
    metadata = ((PROTOCOL_KEY, version),)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as unary:
            await stub.Check(health_pb2.HealthCheckRequest(), metadata=metadata)
        with pytest.raises(grpc.aio.AioRpcError) as stream:
            await anext(aiter(stub.Watch(health_pb2.HealthCheckRequest(), metadata=metadata)))
    first, second = from_rpc_error(unary.value), from_rpc_error(stream.value)
    assert first.message == second.message
    assert isinstance(second, IncompatibleVersionError)
    return second


@pytest.mark.parametrize("open_any", [open_channel, client_channel])
async def test_both_kinds_of_channel_reach_a_server(address, open_any):
    async with open_any(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status == SERVING
        stream = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await stream.read()).status == SERVING
        stream.cancel()


async def test_a_caller_that_names_no_version_is_served(address):
    async with grpc.aio.insecure_channel(address) as channel:
        response = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert response.status == SERVING


async def test_an_older_caller_is_told_to_upgrade_itself(address):
    message = (await refusal_of(address, str(PROTOCOL_VERSION - 1))).message
    assert f"protocol {PROTOCOL_VERSION - 1}" in message
    assert f"protocol {PROTOCOL_VERSION}" in message
    assert "upgrade the caller" in message


async def test_a_newer_caller_is_told_to_upgrade_the_server(address):
    assert "upgrade this server" in (await refusal_of(address, str(PROTOCOL_VERSION + 1))).message


async def test_a_taken_port_is_passed_over(address):
    taken = int(address.rpartition(":")[2])
    server = new_server()
    assert bind(server, "127.0.0.1", range(taken, taken + 20), None) > taken
    await server.stop(None)


async def test_taken_ports_are_named(address):
    taken = int(address.rpartition(":")[2])
    server = new_server()
    with pytest.raises(ConfigurationError, match=f"port {taken} of 127.0.0.1: taken"):
        bind(server, "127.0.0.1", range(taken, taken + 1), None)
    await server.stop(None)


async def test_a_foreign_address_is_not_listened_on():
    server = new_server()
    with pytest.raises(ConfigurationError, match=r"192\.0\.2\.1 is not an address of this machine"):
        bind(server, "192.0.2.1", range(0), None)
    await server.stop(None)


@asynccontextmanager
async def silenceable(address: str):
    """Pass bytes to `address` from another port until the event that is yielded, too, is cleared: then swallow them."""
    is_passing = asyncio.Event()
    is_passing.set()
    host, _, port = address.rpartition(":")

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if is_passing.is_set():
                writer.write(data)
        writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))

    async with await asyncio.start_server(connect, host, 0) as server:
        yield "{}:{}".format(*server.sockets[0].getsockname()), is_passing


@pytest.mark.slow
@pytest.mark.timeout(15)
async def test_a_peer_that_falls_silent_without_closing_is_noticed(address):
    async with silenceable(address) as (through, is_passing), open_channel(through) as channel:
        stream = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await stream.read()).status == SERVING
        is_passing.clear()
        with pytest.raises(grpc.aio.AioRpcError) as lost:
            await stream.read()
    assert lost.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_an_internal_channel_uses_no_proxy(address, monkeypatch):
    for name in ("http_proxy", "grpc_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "no_grpc_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    async with open_channel(address) as channel:
        response = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
    assert response.status == SERVING


async def test_a_proxy_is_never_asked_for_this_machine(address, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # the discard port: nobody there
    monkeypatch.delenv("no_proxy", raising=False)
    async with client_channel(address) as channel:
        assert (await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())).status == SERVING

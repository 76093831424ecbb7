"""Channels and servers with the options that every connection of ours needs. Covers versions, sizes, keepalive, ports.

Every call carries the metadata key `spanwise-protocol`; a server refuses another version than its own, and accepts
calls without the key (grpcurl, health probes). Credentials are `cluster.wire.tls`'.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

import grpc

from cluster.errors import ConfigurationError, IncompatibleVersionError
from cluster.version import PROTOCOL_VERSION, VERSION
from cluster.wire.status import abort_with

if TYPE_CHECKING:
    from cluster.wire.tls import Credentials

PROTOCOL_KEY = "spanwise-protocol"
VERSION_KEY = "spanwise-version"
MAX_MESSAGE_BYTES = 64 * 1024**2
"""Bounds a prompt of token ids or text; hidden states travel in pieces of 1 MiB."""
MAX_BACKLOG = 100_000
"""Calls that came and that Python has not yet seen."""

_KEEPALIVE = (
    # A neighbour whose machine vanished without closing its sockets is noticed within the sum of the two.
    ("grpc.keepalive_time_ms", 1_500),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.ping_timeout_ms", 3_000),  # left out, it is 60 s and the keepalive's timeout has no effect (gRPC 1.85)
    # On a slow link a ping's answer must not wait behind megabytes of hidden states: no pings that probe the bandwidth
    # (they come with the data), and a fixed window that also bounds what lies in socket buffers.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 512 * 1024),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
_SIZES = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)
_SERVER_OPTIONS = (
    *_SIZES,
    *_KEEPALIVE,
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
    ("grpc.so_reuseport", 0),
    # Beyond 1,000, by default, gRPC ends calls with a bare CANCELLED; the coordinator's own queue says that it is full.
    ("grpc.server.max_pending_requests", MAX_BACKLOG),
    ("grpc.server.max_pending_requests_hard_limit", MAX_BACKLOG),
)
_INTERNAL_OPTIONS = (
    *_SIZES,
    *_KEEPALIVE,
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # A new epoch dials anew: it must not inherit a connection that is dying, or its back-off.
    ("grpc.use_local_subchannel_pool", 1),
)
_CLIENT_OPTIONS = (
    *_SIZES,
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
)


def open_channel(address: str, credentials: Credentials | None = None) -> grpc.aio.Channel:
    """Open a channel between processes of one cluster: never through a proxy, and quick to notice a dead neighbour."""
    interceptors = version_interceptors()
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=_INTERNAL_OPTIONS, interceptors=interceptors)
    return grpc.aio.secure_channel(address, credentials.channel(), options=_INTERNAL_OPTIONS, interceptors=interceptors)


def client_channel(address: str) -> grpc.aio.Channel:
    """Open a channel from a client to the server: through the proxy of the environment, but never to this machine."""
    options = (*_CLIENT_OPTIONS, ("grpc.enable_http_proxy", 0 if _is_loopback(address) else 1))
    return grpc.aio.insecure_channel(address, options=options, interceptors=version_interceptors())


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    return host == "localhost" or host.startswith("127.") or host == "::1"


def new_server() -> grpc.aio.Server:
    """Return a server without services or ports."""
    return grpc.aio.server(options=_SERVER_OPTIONS, interceptors=(_VersionGate(),))


def bind(server: grpc.aio.Server, host: str, ports: Sequence[int], credentials: Credentials | None) -> int:
    """Listen on the first free port of `ports`, or on any when that is empty; return the port.

    Raises ConfigurationError saying which ports are taken.
    """
    for port in ports or (0,):
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if credentials is None:
                return int(server.add_insecure_port(address))
            return int(server.add_secure_port(address, credentials.server()))
        except RuntimeError:
            continue  # taken: try the next one
    what = f"port {ports[0]}" if len(ports) == 1 else f"any of the ports {ports[0]}-{ports[-1]}" if ports else "a port"
    raise ConfigurationError(
        f"cannot listen on {what} of {host}: taken by another program, or {host} is not an address of this machine; "
        "choose others with --port or --stage-ports"
    )


# --- versions --------------------------------------------------------------------------------------------------------


def _with_version(details: grpc.aio.ClientCallDetails) -> grpc.aio.ClientCallDetails:
    metadata = grpc.aio.Metadata(*(details.metadata or ()))
    metadata.add(PROTOCOL_KEY, str(PROTOCOL_VERSION))
    metadata.add(VERSION_KEY, VERSION)
    return grpc.aio.ClientCallDetails(
        details.method, details.timeout, metadata, details.credentials, details.wait_for_ready
    )


class _AddVersionUnary(grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(_with_version(client_call_details), request)


class _AddVersionStream(grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(_with_version(client_call_details), request)


def version_interceptors() -> list[grpc.aio.ClientInterceptor]:
    """Return what adds the version to calls. Streams of steps need none: they follow a hello."""
    return [_AddVersionUnary(), _AddVersionStream()]


class _VersionGate(grpc.aio.ServerInterceptor):
    """Refuses calls of another protocol version."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        metadata = dict(handler_call_details.invocation_metadata or ())
        theirs = metadata.get(PROTOCOL_KEY)
        handler = await continuation(handler_call_details)
        if theirs is None or theirs == str(PROTOCOL_VERSION) or handler is None:
            return handler
        return _refusing(handler, _explain(str(theirs), str(metadata.get(VERSION_KEY, "unknown"))))


def _explain(protocol: str, version: str) -> str:
    is_older = protocol.isdigit() and int(protocol) < PROTOCOL_VERSION
    side = "the caller" if is_older else "this server"
    return (
        f"the caller speaks protocol {protocol} (spanwise {version}), this server protocol {PROTOCOL_VERSION} "
        f"(spanwise {VERSION}): upgrade {side}"
    )


def _refusing(handler: grpc.RpcMethodHandler[Any, Any], message: str) -> grpc.RpcMethodHandler[Any, Any]:
    """Return a handler of the same kind that only refuses."""

    async def refuse(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await abort_with(context, IncompatibleVersionError(message))

    kinds = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    make = kinds[handler.request_streaming, handler.response_streaming]
    return make(refuse, handler.request_deserializer, handler.response_serializer)

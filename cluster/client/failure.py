"""What a failed call means to the caller. The mapping is `cluster.wire.status`'s; here are the sentences for failures
that no Spanwise server wrote: nobody answers, or a message is larger than gRPC lets through.
"""

from __future__ import annotations

import grpc

from cluster.errors import (
    InvalidRequestError,
    OverloadedError,
    RequestCancelledError,
    SpanwiseError,
    StageUnavailableError,
)
from cluster.wire.status import REASON_KEY, from_rpc_error


def error_of_call(rpc_error: grpc.aio.AioRpcError, address: str) -> SpanwiseError:
    """Return the error of a call to the server at `address`."""
    error = from_rpc_error(rpc_error)
    if any(key == REASON_KEY for key, _ in rpc_error.trailing_metadata() or ()):
        return error
    if isinstance(error, StageUnavailableError):
        return StageUnavailableError(
            f"no server answers at {address} ({error.message}); start one with `cluster serve MODEL`, or correct the "
            "address (--server, SPANWISE_SERVER)"
        )
    if isinstance(error, RequestCancelledError):  # who cancels here gets no answer: it was the other side, or gRPC
        return StageUnavailableError(f"{address} ended the call, being overloaded or about to stop: {error.message}")
    if isinstance(error, OverloadedError):  # a Spanwise server names its reason; this is gRPC's limit on messages
        return InvalidRequestError(f"the request or its answer is too large for {address}: {error.message}")
    return error

"""Domain errors to gRPC statuses and back. Foreign exceptions stop here.

A status carries the error's sentence as its details and the error's `reason` as the trailing metadata key
`spanwise-reason`. Covers the mapping of DESIGN's error table; retrying is the caller's business.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, NoReturn

import grpc

from cluster import errors
from cluster.errors import SpanwiseError

logger = logging.getLogger(__name__)

REASON_KEY = "spanwise-reason"

_STATUS_OF: dict[type[SpanwiseError], grpc.StatusCode] = {
    errors.InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.StageUnavailableError: grpc.StatusCode.UNAVAILABLE,
    errors.StalePlacementError: grpc.StatusCode.ABORTED,
    errors.NotReadyError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.StageTimeoutError: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.AuthenticationError: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDeniedError: grpc.StatusCode.PERMISSION_DENIED,
    errors.NotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.RequestCancelledError: grpc.StatusCode.CANCELLED,
    errors.IncompatibleVersionError: grpc.StatusCode.UNIMPLEMENTED,
    errors.InvariantError: grpc.StatusCode.INTERNAL,
    errors.StorageError: grpc.StatusCode.DATA_LOSS,
    # A worker's own setting or checkpoint, told to the coordinator while it loads a span:
    errors.ConfigurationError: grpc.StatusCode.FAILED_PRECONDITION,
}

_ERROR_OF: dict[grpc.StatusCode, type[SpanwiseError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequestError,
    grpc.StatusCode.OUT_OF_RANGE: errors.InvalidRequestError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.OverloadedError,
    grpc.StatusCode.UNAVAILABLE: errors.StageUnavailableError,
    grpc.StatusCode.ABORTED: errors.StalePlacementError,
    grpc.StatusCode.FAILED_PRECONDITION: errors.NotReadyError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.StageTimeoutError,
    grpc.StatusCode.UNAUTHENTICATED: errors.AuthenticationError,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDeniedError,
    grpc.StatusCode.NOT_FOUND: errors.NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: errors.InvalidRequestError,
    grpc.StatusCode.CANCELLED: errors.RequestCancelledError,
    grpc.StatusCode.UNIMPLEMENTED: errors.IncompatibleVersionError,
    grpc.StatusCode.INTERNAL: errors.InvariantError,
    grpc.StatusCode.DATA_LOSS: errors.StorageError,
    # Never sent by us, but by a foreign server, a proxy or gRPC itself:
    grpc.StatusCode.OK: errors.InvariantError,
    grpc.StatusCode.UNKNOWN: errors.InvariantError,
}


def status_of(error: SpanwiseError) -> grpc.StatusCode:
    """Return the status that tells this error."""
    return _STATUS_OF[type(error)]


def error_of(code: grpc.StatusCode, details: str, reason: str | None = None) -> SpanwiseError:
    """Return the error that a status tells."""
    if reason == errors.ConfigurationError.default_reason:
        return errors.ConfigurationError(details)
    if reason is None and code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        return errors.InvalidRequestError(f"the message is too large: {details}", reason="MESSAGE_TOO_LARGE")
    return _ERROR_OF[code](details, reason=reason)


def from_rpc_error(error: grpc.RpcError) -> SpanwiseError:
    """Return what a failed call means; `error` is grpc.aio's AioRpcError or the synchronous API's equivalent."""
    call: Any = error
    metadata = call.trailing_metadata() or ()
    reason = next((str(value) for key, value in metadata if key == REASON_KEY), None)
    return error_of(call.code(), call.details() or str(call.code()), reason)


def is_worded(error: grpc.RpcError) -> bool:
    """Tell whether the other side said what is wrong; if not, the error is the connection's."""
    call: Any = error
    return any(key == REASON_KEY for key, _ in call.trailing_metadata() or ())


def as_spanwise_error(error: BaseException) -> SpanwiseError:
    """Return a domain error for whatever was raised; an unknown one is ours to report, with its traceback logged."""
    if isinstance(error, SpanwiseError):
        return error
    if isinstance(error, grpc.RpcError):
        return from_rpc_error(error)
    logger.error("unexpected %s", type(error).__name__, exc_info=error)
    return errors.InvariantError(f"unexpected {type(error).__name__}: {error}; please report this")


async def abort_with(context: grpc.aio.ServicerContext[Any, Any], error: BaseException) -> NoReturn:
    """End a call with the error's status. Cancellation and an abort that is under way pass through."""
    if isinstance(error, (asyncio.CancelledError, grpc.aio.AbortError)):
        raise error
    known = as_spanwise_error(error)
    is_configuration = isinstance(known, errors.ConfigurationError)  # its reason tells it from NotReadyError
    reason = known.default_reason if is_configuration else known.reason
    await context.abort(status_of(known), known.message, ((REASON_KEY, reason),))
    raise AssertionError("abort returned")

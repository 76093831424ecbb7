"""Every error that Spanwise raises on purpose.

    SpanwiseError
    ├── InvalidRequestError        INVALID_ARGUMENT     malformed, too long, can never fit: never works
    ├── OverloadedError            RESOURCE_EXHAUSTED   queue or pages full: back off
    ├── StageUnavailableError      UNAVAILABLE          a stage (or the coordinator) cannot be reached
    ├── StalePlacementError        ABORTED              an old epoch: replay under the new one
    ├── NotReadyError              FAILED_PRECONDITION  loading or draining: wait
    ├── StageTimeoutError          DEADLINE_EXCEEDED    fate unknown: the step's epoch is abandoned
    ├── AuthenticationError        UNAUTHENTICATED      no or bad credentials
    ├── PermissionDeniedError      PERMISSION_DENIED    credentials without the right
    ├── NotFoundError              NOT_FOUND            no such model, request or file
    ├── RequestCancelledError      CANCELLED            the client went away
    ├── IncompatibleVersionError   UNIMPLEMENTED        two sides speak different protocol versions
    ├── InvariantError             INTERNAL             our bug: please report
    ├── StorageError               DATA_LOSS            stored weights are damaged, cut short or cannot be read
    └── ConfigurationError         FAILED_PRECONDITION  a setting, a checkpoint or a machine is not as needed

Each class carries `reason`, a stable machine-readable word that tells e.g. a full queue from full pages.
`cluster.wire.status` maps them to gRPC statuses and back; foreign exceptions stop there.
"""

from __future__ import annotations


class SpanwiseError(Exception):
    """Root of the tree. `str(error)` is a sentence for a person: what happened, where, what to do."""

    default_reason = "UNKNOWN"

    def __init__(self, message: str, *, reason: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason


class InvalidRequestError(SpanwiseError):
    """The request is malformed or can never be served by this placement; repeating it never works."""

    default_reason = "INVALID_REQUEST"


class OverloadedError(SpanwiseError):
    """The bounded queue is full; back off and try again."""

    default_reason = "QUEUE_FULL"


class StageUnavailableError(SpanwiseError):
    """A stage, or the coordinator itself, cannot be reached."""

    default_reason = "STAGE_UNAVAILABLE"


class StalePlacementError(SpanwiseError):
    """The call belongs to an epoch that has been replaced; the sequence must be replayed."""

    default_reason = "STALE_EPOCH"


class NotReadyError(SpanwiseError):
    """The model is still loading, or the service is draining."""

    default_reason = "NOT_READY"


class StageTimeoutError(SpanwiseError):
    """A deadline passed; the step's fate is unknown, so its epoch is abandoned."""

    default_reason = "DEADLINE"


class AuthenticationError(SpanwiseError):
    """Credentials are missing or wrong."""

    default_reason = "UNAUTHENTICATED"


class PermissionDeniedError(SpanwiseError):
    """The credentials are valid but do not allow this (for example a gated repository)."""

    default_reason = "PERMISSION_DENIED"


class NotFoundError(SpanwiseError):
    """There is no such model, request or file."""

    default_reason = "NOT_FOUND"


class RequestCancelledError(SpanwiseError):
    """The client went away or aborted the request."""

    default_reason = "CANCELLED"


class IncompatibleVersionError(SpanwiseError):
    """The two sides speak different protocol versions."""

    default_reason = "PROTOCOL_VERSION"


class InvariantError(SpanwiseError):
    """A bug of ours: something that the code relies on does not hold."""

    default_reason = "INVARIANT"


class StorageError(SpanwiseError):
    """Stored weights are damaged, cut short or cannot be read; the message names the block. Loading again rebuilds."""

    default_reason = "DAMAGED_WEIGHTS"


class ConfigurationError(SpanwiseError):
    """A setting, a checkpoint or a machine is not as it must be; found before anything is served."""

    default_reason = "CONFIGURATION"

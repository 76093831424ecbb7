import grpc
import pytest
from grpc.aio import AioRpcError, Metadata

from cluster import errors
from cluster.errors import ConfigurationError, InvariantError, SpanwiseError
from cluster.wire.status import REASON_KEY, abort_with, as_spanwise_error, from_rpc_error, status_of

ERROR_CLASSES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, SpanwiseError) and value is not SpanwiseError
]


class RecordingContext:
    """Keeps what a servicer aborts with, and raises as gRPC does."""

    async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: tuple[tuple[str, str], ...]) -> None:
        self.rpc_error = AioRpcError(code, Metadata(), Metadata(*trailing_metadata), details=details)
        raise grpc.aio.AbortError


async def through_the_wire(error: BaseException) -> SpanwiseError:
    context = RecordingContext()
    with pytest.raises(grpc.aio.AbortError):
        await abort_with(context, error)
    return from_rpc_error(context.rpc_error)


def status(code: grpc.StatusCode, details: str = "why", reason: str | None = None) -> AioRpcError:
    trailing = Metadata(*(((REASON_KEY, reason),) if reason else ()))
    return AioRpcError(code, Metadata(), trailing, details=details)


@pytest.mark.parametrize("error_class", ERROR_CLASSES)
async def test_every_error_arrives_as_it_was_raised(error_class):
    arrived = await through_the_wire(error_class("stage 1 has no page 7"))
    assert type(arrived) is error_class
    assert arrived.message == "stage 1 has no page 7"
    assert arrived.reason == error_class.default_reason


@pytest.mark.parametrize("error_class", [cls for cls in ERROR_CLASSES if cls is not ConfigurationError])
async def test_a_reason_of_its_own_arrives(error_class):
    assert (await through_the_wire(error_class("full", reason="PAGES_FULL"))).reason == "PAGES_FULL"


async def test_a_configuration_error_with_a_reason_of_its_own_stays_a_configuration_error():
    assert type(await through_the_wire(ConfigurationError("no space", reason="DISK_FULL"))) is ConfigurationError


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_every_status_is_an_error_of_ours(code):
    translated = from_rpc_error(status(code))
    assert type(translated) in ERROR_CLASSES
    assert translated.message == "why"


def test_errors_and_statuses_are_paired():
    shared = {ConfigurationError: grpc.StatusCode.FAILED_PRECONDITION}
    codes = [status_of(cls("x")) for cls in ERROR_CLASSES if cls not in shared]
    assert len(set(codes)) == len(codes)


def test_a_status_without_details_names_its_code():
    assert "UNAVAILABLE" in from_rpc_error(status(grpc.StatusCode.UNAVAILABLE, details="")).message


def test_a_message_over_grpcs_limit_is_the_callers_fault():
    details = "CLIENT: Received message larger than max (70000000 vs. 67108864)"
    translated = from_rpc_error(status(grpc.StatusCode.RESOURCE_EXHAUSTED, details))
    assert isinstance(translated, errors.InvalidRequestError)


async def test_an_unknown_exception_is_our_bug_and_its_traceback_is_logged(caplog):
    try:
        _ = 1 // 0
    except ZeroDivisionError as error:
        arrived = await through_the_wire(error)
    assert type(arrived) is InvariantError
    assert "ZeroDivisionError: integer division or modulo by zero" in arrived.message
    assert "Traceback" in caplog.text


async def test_an_abort_is_not_aborted_twice():
    context = RecordingContext()
    raised = grpc.aio.AbortError()
    with pytest.raises(grpc.aio.AbortError) as caught:
        await abort_with(context, raised)
    assert caught.value is raised


def test_our_own_errors_are_not_wrapped():
    error = errors.NotFoundError("no such model")
    assert as_spanwise_error(error) is error

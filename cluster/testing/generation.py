"""A Generation service that says what a test tells it to: a real gRPC server on a free port of this machine.

    with FakeGenerationServer([text("Paris"), text("."), *end()]) as server:
        with Client(server.address) as client:
            assert client.complete("The capital of France is").text == "Paris."

Each Generate call plays the script: messages are sent; a SpanwiseError ends the call with its status; `SILENCE` says
nothing until the client goes away; a `threading.Event` is waited for. It runs on threads of its own, so that code with
and without asyncio can be tested. Tokens are the bytes of UTF-8 text. Covers no scheduling and no model.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent import futures
from enum import Enum
from types import TracebackType
from typing import Any

import grpc

from cluster.errors import NotFoundError, SpanwiseError
from cluster.request import FinishReason
from cluster.rpc.v1 import generation_pb2 as generation
from cluster.rpc.v1 import generation_service_pb2 as service
from cluster.rpc.v1 import generation_service_pb2_grpc as service_grpc
from cluster.version import PROTOCOL_VERSION, VERSION
from cluster.wire.generation import finish_reason_to_proto
from cluster.wire.status import REASON_KEY, status_of


class Silence(Enum):
    """Say nothing more, until the client goes away."""

    SILENCE = "silence"


SILENCE = Silence.SILENCE

Step = service.GenerateResponse | SpanwiseError | Silence | threading.Event


def accepted(*, request_id: str = "", num_prompt_tokens: int = 1) -> service.GenerateResponse:
    """The first message of a stream."""
    return service.GenerateResponse(
        accepted=generation.Accepted(request_id=request_id, num_prompt_tokens=num_prompt_tokens)
    )


def queued(position: int) -> service.GenerateResponse:
    """Progress of a request that waits behind `position` others."""
    progress = generation.Progress(phase=generation.Progress.PHASE_QUEUED, queue_position=position)
    return service.GenerateResponse(progress=progress)


def text(content: str, *, completion_index: int = 0) -> service.GenerateResponse:
    """A piece; its token ids are the bytes of the text."""
    piece = generation.Piece(text=content, token_ids=list(content.encode()), completion_index=completion_index)
    return service.GenerateResponse(piece=piece)


def end(
    reason: FinishReason = FinishReason.STOP, *, num_completions: int = 1, num_completion_tokens: int = 1
) -> list[service.GenerateResponse]:
    """The last messages of a stream."""
    reason_number = finish_reason_to_proto(reason)
    ends = [
        service.GenerateResponse(
            completion_finished=generation.CompletionFinished(completion_index=index, reason=reason_number)
        )
        for index in range(num_completions)
    ]
    finished = generation.Finished(
        num_prompt_tokens=1,
        num_completion_tokens=num_completion_tokens,
        prefill_seconds=0.5,
        decode_seconds=1.0,
        fingerprint=generation.Fingerprint(model="fake", revision="0" * 40),
    )
    return [*ends, service.GenerateResponse(finished=finished)]


def ready_status(*, num_stages: int = 2) -> service.DescribeClusterResponse:
    """What a cluster tells that serves a small model."""
    stages = [
        service.StageStatus(
            stage=stage,
            state=service.STAGE_STATE_READY,
            worker_id=f"w{stage}",
            node_name="node-a",
            address=f"127.0.0.1:{7100 + stage}",
            device="cpu",
            numerics=generation.StageNumerics(first_block=2 * stage, end_block=2 * stage + 2, precision="fp32"),
            weight_bytes=3 * 1024**2,
            resident_bytes=3 * 1024**2,
            resident_share=1.0,
            kv_bytes=1024**2,
            free_memory_bytes=4 * 1024**3,
            total_memory_bytes=8 * 1024**3,
        )
        for stage in range(num_stages)
    ]
    return service.DescribeClusterResponse(
        version=VERSION,
        protocol_version=PROTOCOL_VERSION,
        state=service.CLUSTER_STATE_READY,
        model=_model(has_chat_template=True),
        stages=stages,
        num_pages=8,
        num_free_pages=8,
        page_size=64,
        epoch="1.1",
    )


DEFAULT_SCRIPT: tuple[Step, ...] = (accepted(), text("Hello"), text(", world"), *end())


class FakeGenerationServer:
    """A scripted server. Attributes may be changed at any time; they hold for the next call.

    `scripts`: one per Generate call, the last one repeats. `requests`: the Generate requests so far. `status`: what
    DescribeCluster answers, or an error. `wait_cancelled` waits until a client went away before the end of its script.
    """

    def __init__(
        self,
        *scripts: Sequence[Step],
        has_chat_template: bool = True,
        status: service.DescribeClusterResponse | None = None,
    ) -> None:
        self.scripts: list[Sequence[Step]] = list(scripts) or [DEFAULT_SCRIPT]
        self.status: service.DescribeClusterResponse | SpanwiseError = status or ready_status()
        self.has_chat_template = has_chat_template
        self.requests: list[service.GenerateRequest] = []
        self.aborted_ids: list[str] = []
        self.address = ""
        self._cancelled = threading.Event()
        self._server = grpc.server(futures.ThreadPoolExecutor(max_workers=64))
        self._port = 0

    def __enter__(self) -> FakeGenerationServer:
        service_grpc.add_GenerationServiceServicer_to_server(_Servicer(self), self._server)
        self._port = self._server.add_insecure_port("127.0.0.1:0")
        self.address = f"127.0.0.1:{self._port}"
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop at once: calls under way end in UNAVAILABLE or CANCELLED. Idempotent."""
        self._server.stop(None).wait()

    def wait_cancelled(self, timeout_seconds: float = 10.0) -> bool:
        """Wait until a client cancelled a call; False when none did in time."""
        return self._cancelled.wait(timeout_seconds)

    def play(
        self, request: service.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[service.GenerateResponse]:
        """Answer one Generate call from the next script."""
        call = _Call(self._cancelled)
        if not context.add_callback(call.end):
            return
        script = self.scripts[min(len(self.requests), len(self.scripts) - 1)]
        self.requests.append(request)
        for step in script:
            if isinstance(step, service.GenerateResponse):
                yield step
            elif isinstance(step, SpanwiseError):
                call.is_answered = True
                fail(context, step)
            elif not call.reaches(step):
                return
        call.is_answered = True


class _Call:
    """One Generate call: whether it was answered to the end, and whether it ended before."""

    def __init__(self, cancelled: threading.Event) -> None:
        self.is_answered = False
        self._ended = threading.Event()
        self._cancelled = cancelled

    def end(self) -> None:
        """gRPC's notice that the call is over, whoever ended it."""
        self._ended.set()
        if not self.is_answered:
            self._cancelled.set()

    def reaches(self, step: Silence | threading.Event) -> bool:
        """Wait for an event; False when the client went away first."""
        while not self._ended.wait(0.01):
            if isinstance(step, threading.Event) and step.is_set():
                return True
        return False


def fail(context: grpc.ServicerContext, error: SpanwiseError) -> None:
    """End a call with an error's status, as the real server does."""
    context.set_trailing_metadata(((REASON_KEY, error.reason),))
    context.abort(status_of(error), error.message)


def _model(*, has_chat_template: bool) -> service.Model:
    return service.Model(
        name="fake",
        architecture="bloom",
        revision="0" * 40,
        max_context=2048,
        vocab_size=256,
        has_chat_template=has_chat_template,
    )


class _Servicer(service_grpc.GenerationServiceServicer):
    """The RPCs of a FakeGenerationServer."""

    def __init__(self, server: FakeGenerationServer) -> None:
        self._server = server

    def Generate(self, request: Any, context: Any) -> Iterator[service.GenerateResponse]:  # noqa: N802
        yield from self._server.play(request, context)

    def Abort(self, request: Any, context: Any) -> service.AbortResponse:  # noqa: N802
        if not any(known.request_id == request.request_id for known in self._server.requests):
            fail(context, NotFoundError(f"there is no request {request.request_id}"))
        self._server.aborted_ids.append(request.request_id)
        return service.AbortResponse()

    def Tokenize(self, request: Any, context: Any) -> service.TokenizeResponse:  # noqa: N802, ARG002
        content = request.text or "".join(f"{m.role}: {m.content}\n" for m in request.chat.messages)
        return service.TokenizeResponse(token_ids=list(content.encode()), text=content)

    def Detokenize(self, request: Any, context: Any) -> service.DetokenizeResponse:  # noqa: N802, ARG002
        return service.DetokenizeResponse(text=bytes(request.token_ids).decode(errors="replace"))

    def ListModels(self, request: Any, context: Any) -> service.ListModelsResponse:  # noqa: N802, ARG002
        return service.ListModelsResponse(models=[_model(has_chat_template=self._server.has_chat_template)])

    def DescribeCluster(self, request: Any, context: Any) -> service.DescribeClusterResponse:  # noqa: N802, ARG002
        status = self._server.status
        if isinstance(status, SpanwiseError):
            fail(context, status)
            raise AssertionError("unreachable: aborting raises")
        return status

"""A request under way: an async iterator of pieces over one Generate stream.

Covers opening (with retries before the first message), silence, cancelling. Whole completions are put together here
too, from pieces.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc

from cluster.client.failure import error_of_call
from cluster.client.values import (
    Choice,
    Completion,
    Piece,
    Progress,
    Summary,
    read_completion_finished,
    read_finished,
    read_piece,
    read_progress,
    read_prompt,
)
from cluster.errors import RequestCancelledError, SpanwiseError, StageTimeoutError, StageUnavailableError
from cluster.rpc.v1 import generation_service_pb2 as service

OpenStream = Callable[[], Any]
"""Starts the RPC and returns grpc's call; every attempt starts a new one."""

Backoff = Callable[[SpanwiseError, int], Awaitable[None]]
"""Waits before the next attempt, given the error and how many failed; raises the error to give up."""


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """How to listen to a stream."""

    address: str
    silence_timeout: float | None
    has_echo: bool
    on_progress: Callable[[Progress], None] | None


class Generation(AsyncIterator[Piece]):
    """Iterate to get pieces; the request starts with the first. Closing it, dropping it, or cancelling the task that
    iterates aborts the request on the server. `summary` is set once the last piece was given.
    """

    def __init__(self, request_id: str, open_stream: OpenStream, backoff: Backoff, settings: StreamSettings) -> None:
        self.request_id = request_id
        # The generator refers to the stream and not to this object, so that dropping this object drops the generator.
        self._stream = _Stream(request_id, open_stream, backoff, settings)
        self._pieces = self._stream.pieces()
        self._turn = asyncio.Lock()  # an async generator runs one thing at a time

    @property
    def summary(self) -> Summary | None:
        return self._stream.summary

    async def __anext__(self) -> Piece:
        async with self._turn:
            return await anext(self._pieces)

    async def aclose(self) -> None:
        """Abort the request if it still runs; a task that waits for its next piece gets RequestCancelledError.
        Idempotent."""
        self._stream.cancel()
        async with self._turn:
            await self._pieces.aclose()

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class _Stream:
    """The call behind a Generation."""

    def __init__(self, request_id: str, open_stream: OpenStream, backoff: Backoff, settings: StreamSettings) -> None:
        self.summary: Summary | None = None
        self._request_id = request_id
        self._open_stream = open_stream
        self._backoff = backoff
        self._settings = settings
        self._call: Any = None
        self._is_closed = False

    def cancel(self) -> None:
        self._is_closed = True
        if self._call is not None:
            self._call.cancel()

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        try:
            response = await self._first_message()
            while response is not None:
                piece = self._take(response)
                if piece is not None:
                    yield piece
                response = await self._read()
        finally:
            self.cancel()  # without effect on a call that has ended
        if self.summary is None:
            raise StageUnavailableError(
                f"{self._settings.address} closed the stream of request {self._request_id} before its end; "
                "the text so far is incomplete, send the request again"
            )

    async def _first_message(self) -> service.GenerateResponse | None:
        num_failed = 0
        while not self._is_closed:
            self._call = self._open_stream()
            try:
                return await self._read()
            except StageUnavailableError as error:
                num_failed += 1
                await self._backoff(error, num_failed)
        raise self._closed_here()

    async def _read(self) -> service.GenerateResponse | None:
        """Return the next message, None at the end of the stream."""
        timeout = self._settings.silence_timeout
        try:
            async with asyncio.timeout(timeout):
                response = await self._call.read()
        except TimeoutError:
            raise StageTimeoutError(
                f"{self._settings.address} sent nothing for {timeout:g} s about request {self._request_id}; it tells "
                "progress every 15 s, so it or the network hangs: see `cluster status`, or raise silence_timeout"
            ) from None
        except grpc.aio.AioRpcError as error:
            raise error_of_call(error, self._settings.address) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._is_closed and not (task and task.cancelling()):
                raise self._closed_here() from None
            raise
        return None if response is grpc.aio.EOF else response

    def _closed_here(self) -> RequestCancelledError:
        return RequestCancelledError(f"request {self._request_id} was closed on this side")

    def _take(self, response: service.GenerateResponse) -> Piece | None:
        """Return the piece that a message holds, if any, and act on what it tells besides."""
        match response.WhichOneof("event"):
            case "piece":
                return read_piece(response.piece)
            case "completion_finished":
                return read_completion_finished(response.completion_finished)
            case "prompt_echo":
                return read_prompt(response.prompt_echo, has_text=self._settings.has_echo)
            case "progress" if self._settings.on_progress is not None:
                self._settings.on_progress(read_progress(response.progress))
            case "finished":
                self.summary = read_finished(response.finished)
        return None


async def collect(generation: Generation) -> Completion:
    """Return everything that a request gives, as one value."""
    prompt: Piece | None = None
    pieces: defaultdict[int, list[Piece]] = defaultdict(list)
    async with generation:
        async for piece in generation:
            if piece.is_prompt:
                prompt = piece
            else:
                pieces[piece.completion_index].append(piece)
    assert generation.summary is not None  # the iterator raises otherwise
    choices = tuple(_join(pieces[index]) for index in sorted(pieces))
    return Completion(generation.request_id, choices, generation.summary, prompt)


def _join(pieces: list[Piece]) -> Choice:
    last = pieces[-1]
    if last.finish_reason is None:
        raise StageUnavailableError("the server did not say how a completion ended; send the request again")
    return Choice(
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(token_id for piece in pieces for token_id in piece.token_ids),
        logprobs=tuple(logprob for piece in pieces for logprob in piece.logprobs),
        finish_reason=last.finish_reason,
        stop_string=last.stop_string,
    )

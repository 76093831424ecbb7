"""The client for code without asyncio: a thin wrapper that runs an AsyncClient on a thread of its own."""

from __future__ import annotations

import weakref
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Any, TypeVar, Unpack

from cluster.client.aio import DEFAULT_SILENCE_TIMEOUT, AsyncClient
from cluster.client.generation import Generation
from cluster.client.loop_thread import LoopClosedError, LoopThread
from cluster.client.options import GenerateOptions, Prompt
from cluster.client.retry import RetryPolicy
from cluster.client.values import ChatMessage, ClusterStatus, Completion, Model, Piece, Summary
from cluster.errors import RequestCancelledError

Result = TypeVar("Result")


class Client:
    """What AsyncClient does, blocking. Works in any thread, also one whose event loop runs; Ctrl-C aborts the request.
    A client that nothing refers to any more, its generations included, closes itself.

    with Client("127.0.0.1:7050") as client:
        for piece in client.generate("The capital of France is", max_tokens=20):
            print(piece.text, end="", flush=True)
    """

    def __init__(
        self,
        address: str = "127.0.0.1:7050",
        *,
        silence_timeout: float | None = DEFAULT_SILENCE_TIMEOUT,
        retry: RetryPolicy | None = None,
    ) -> None:
        self.address = address
        self._loop = LoopThread("spanwise-client")
        weakref.finalize(self, self._loop.begin_close).atexit = False  # the loop itself sees to that
        self._client = self._loop.enter(_connected(address, silence_timeout, retry))

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection and end the thread; calls under way get RequestCancelledError. Idempotent."""
        self._loop.close()

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> BlockingGeneration:
        """Return the pieces of the text that follows the prompt, as they come. Options: `GenerateOptions`."""
        return BlockingGeneration(self._client.generate(prompt, **options), self._run)

    def complete(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
        """Return the whole text that follows the prompt."""
        return self._run(self._client.complete(prompt, **options))

    def chat(self, messages: Sequence[ChatMessage], **options: Unpack[GenerateOptions]) -> ChatMessage:
        """Return the assistant's answer to a chat, ready to be appended to it."""
        return self._run(self._client.chat(messages, **options))

    def complete_many(
        self, prompts: Iterable[Prompt], *, concurrency: int = 16, **options: Unpack[GenerateOptions]
    ) -> list[Completion]:
        """Return the completions of many prompts, in their order, with at most `concurrency` requests at once."""
        return self._run(self._client.complete_many(prompts, concurrency=concurrency, **options))

    def tokenize(self, prompt: str | Sequence[ChatMessage], *, model: str = "") -> tuple[int, ...]:
        """Return the token ids of a text or chat, as `generate` would read it."""
        return self._run(self._client.tokenize(prompt, model=model))

    def detokenize(self, token_ids: Iterable[int], *, model: str = "") -> str:
        """Return the text of token ids."""
        return self._run(self._client.detokenize(token_ids, model=model))

    def list_models(self) -> tuple[Model, ...]:
        """Return the models served here."""
        return self._run(self._client.list_models())

    def describe(self) -> ClusterStatus:
        """Return the server's state, stages, memory and load; it answers while a model loads, too."""
        return self._run(self._client.describe())

    def abort(self, request_id: str) -> None:
        """End a request; its stream then finishes with FinishReason.ABORTED."""
        self._run(self._client.abort(request_id))

    def _run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        return self._loop.run(coroutine)


class BlockingGeneration(Iterator[Piece]):
    """A request under way: an iterator of pieces. Closing it (or leaving its `with` block) aborts the request."""

    def __init__(self, generation: Generation, run: Any) -> None:
        self._generation = generation
        self._run = run  # the client's own method: the client lives as long as this

    @property
    def request_id(self) -> str:
        return self._generation.request_id

    @property
    def summary(self) -> Summary | None:
        """Usage, timings and fingerprint, once the last piece was given."""
        return self._generation.summary

    def __next__(self) -> Piece:
        piece: Piece | None = self._run(_next_or_none(self._generation))
        if piece is None:
            raise StopIteration
        return piece

    def close(self) -> None:
        """Abort the request if it still runs. Idempotent."""
        with suppress(LoopClosedError, RequestCancelledError):  # a closed client has aborted it
            self._run(self._generation.aclose())

    def __enter__(self) -> BlockingGeneration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@asynccontextmanager
async def _connected(
    address: str, silence_timeout: float | None, retry: RetryPolicy | None
) -> AsyncIterator[AsyncClient]:
    """grpc binds a channel to the loop in which it is made."""
    async with AsyncClient(address, silence_timeout=silence_timeout, retry=retry) as client:
        yield client


async def _next_or_none(generation: Generation) -> Piece | None:
    """StopAsyncIteration cannot cross a future."""
    return await anext(generation, None)

"""The client of a Spanwise server, for asyncio. `cluster.client.blocking` wraps it for everyone else."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, TypeVar, Unpack

import grpc

from cluster.client.failure import error_of_call
from cluster.client.generation import Generation, StreamSettings, collect
from cluster.client.options import (
    GenerateOptions,
    Prompt,
    check_names,
    detokenize_request,
    generate_request,
    tokenize_request,
)
from cluster.client.retry import RetryPolicy
from cluster.client.values import ChatMessage, ClusterStatus, Completion, Model, read_cluster, read_model
from cluster.errors import SpanwiseError, StageUnavailableError
from cluster.rpc.v1 import generation_service_pb2 as service
from cluster.rpc.v1 import generation_service_pb2_grpc as service_grpc
from cluster.wire.channels import client_channel

Sleep = Callable[[float], Awaitable[None]]
Response = TypeVar("Response")

DEFAULT_SILENCE_TIMEOUT = 60.0


class AsyncClient:
    """Talks to one server. Safe for many requests at once; use it within one event loop.

        async with AsyncClient("127.0.0.1:7050") as client:
            async for piece in client.generate("The capital of France is", max_tokens=20):
                print(piece.text, end="", flush=True)

    Errors are classes of `cluster.errors`. Time limits are on silence between two messages of the server, never on the
    whole of a request. A server that cannot be reached is tried again (`retry`) before the first message, never after.
    """

    def __init__(
        self,
        address: str = "127.0.0.1:7050",
        *,
        silence_timeout: float | None = DEFAULT_SILENCE_TIMEOUT,
        retry: RetryPolicy | None = None,
        source: random.Random | None = None,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        """`address` is "host:port". Connects with the first call. `source` makes request ids and jitter, `sleep` waits
        between attempts; tests pass their own."""
        self.address = address
        self._silence_timeout = silence_timeout
        self._retry = retry or RetryPolicy()
        self._source = source or random.Random()
        self._sleep = sleep
        self._channel: grpc.aio.Channel = client_channel(address)
        self._stub = service_grpc.GenerationServiceStub(self._channel)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; requests that still run are aborted. Idempotent."""
        await self._channel.close()

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Generation:
        """Return the pieces of the text that follows the prompt, as they come. Options: `GenerateOptions`."""
        request_id = options.get("request_id") or f"{self._source.getrandbits(96):024x}"
        request = generate_request(prompt, options, request_id=request_id)
        settings = StreamSettings(
            address=self.address,
            silence_timeout=options.get("silence_timeout", self._silence_timeout),
            has_echo=request.echo,
            on_progress=options.get("on_progress"),
        )
        return Generation(request_id, lambda: self._stub.Generate(request), self._backoff, settings)

    async def complete(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
        """Return the whole text that follows the prompt."""
        return await collect(self.generate(prompt, **options))

    async def chat(self, messages: Sequence[ChatMessage], **options: Unpack[GenerateOptions]) -> ChatMessage:
        """Return the assistant's answer to a chat, ready to be appended to it."""
        completion = await self.complete(messages, **options)
        return ChatMessage("assistant", completion.text)

    async def complete_many(
        self, prompts: Iterable[Prompt], *, concurrency: int = 16, **options: Unpack[GenerateOptions]
    ) -> list[Completion]:
        """Return the completions of many prompts, in their order, with at most `concurrency` requests at once.

        The first error ends the others and is raised. `request_id` cannot be given: each prompt has its own.
        """
        check_names(options)
        if options.get("request_id") or concurrency < 1:
            raise TypeError("complete_many needs concurrency of at least 1 and makes the request ids itself")
        waiting = enumerate(prompts)
        done: dict[int, Completion] = {}

        async def work() -> None:
            for index, prompt in waiting:
                done[index] = await self.complete(prompt, **options)

        await _all_or_first_error([work() for _ in range(concurrency)])
        return [done[index] for index in sorted(done)]

    async def tokenize(self, prompt: str | Sequence[ChatMessage], *, model: str = "") -> tuple[int, ...]:
        """Return the token ids of a text or chat, as `generate` would read it."""
        response = await self._unary(self._stub.Tokenize, tokenize_request(prompt, model))
        return tuple(response.token_ids)

    async def detokenize(self, token_ids: Iterable[int], *, model: str = "") -> str:
        """Return the text of token ids."""
        response = await self._unary(self._stub.Detokenize, detokenize_request(token_ids, model))
        return str(response.text)

    async def list_models(self) -> tuple[Model, ...]:
        """Return the models served here."""
        response = await self._unary(self._stub.ListModels, service.ListModelsRequest())
        return tuple(read_model(model) for model in response.models)

    async def describe(self) -> ClusterStatus:
        """Return the server's state, stages, memory and load; it answers while a model loads, too."""
        return read_cluster(await self._unary(self._stub.DescribeCluster, service.DescribeClusterRequest()))

    async def abort(self, request_id: str) -> None:
        """End a request; its stream then finishes with FinishReason.ABORTED."""
        await self._unary(self._stub.Abort, service.AbortRequest(request_id=request_id))

    async def _unary(self, method: Callable[..., Any], request: object) -> Any:
        """Call a method that may be repeated: every one but Generate."""
        num_failed = 0
        while True:
            try:
                return await method(request, timeout=self._silence_timeout)
            except grpc.aio.AioRpcError as rpc_error:
                error = error_of_call(rpc_error, self.address)
                if not isinstance(error, StageUnavailableError):
                    raise error from rpc_error
                num_failed += 1
                await self._backoff(error, num_failed)

    async def _backoff(self, error: SpanwiseError, num_failed: int) -> None:
        delay = self._retry.delay_seconds(num_failed, self._source)
        if delay is None:
            raise error
        await self._sleep(delay)


async def _all_or_first_error(coroutines: Sequence[Any]) -> None:
    try:
        async with asyncio.TaskGroup() as group:
            for coroutine in coroutines:
                group.create_task(coroutine)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None

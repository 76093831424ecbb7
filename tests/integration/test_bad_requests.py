"""What cannot be served is refused with a typed error, at once, and changes nothing for anybody else."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import grpc
import pytest
import pytest_asyncio

from cluster.client import AsyncClient, ChatMessage
from cluster.errors import (
    IncompatibleVersionError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
)
from cluster.microbatch import StepHeader
from cluster.rpc.v1 import generation_pb2 as generation
from cluster.rpc.v1 import generation_service_pb2 as service
from cluster.rpc.v1 import generation_service_pb2_grpc as service_grpc
from cluster.wire.channels import PROTOCOL_KEY
from cluster.wire.status import from_rpc_error
from tests.integration.local_cluster import LocalCluster, WatchedLoader, local_cluster

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = "The state of the Union"
MAX_CONTEXT = 128
MAX_WAITING = 2
MEGABYTE = 10**6


class Gate:
    """Lets steps pass, or holds them."""

    def __init__(self) -> None:
        self._is_open = threading.Event()
        self._is_open.set()

    def wait(self, _stage: int, _header: StepHeader) -> None:
        self._is_open.wait()

    def __enter__(self) -> None:
        self._is_open.clear()

    def __exit__(self, *_: object) -> None:
        self._is_open.set()


@pytest.fixture(scope="module")
def gate() -> Gate:
    return Gate()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(gate: Gate) -> AsyncIterator[LocalCluster]:
    """It has few pages and a short queue."""
    loader = partial(WatchedLoader, on_execute=gate.wait)
    settings = {"max_context": MAX_CONTEXT, "max_waiting": MAX_WAITING, "kv_memory": 2 << 20}
    async with local_cluster("bloom-tiny", 2, new_loader=loader, **settings) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(cluster: LocalCluster) -> AsyncIterator[AsyncClient]:
    async with cluster.client() as connected:
        yield connected


GOOD: Any = {"temperature": 1.0, "seed": 5, "ignore_eos": True}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def expected(client: AsyncClient) -> tuple[int, ...]:
    """What a good request gets while there are no others."""
    return (await client.complete(PROMPT, max_tokens=12, **GOOD)).token_ids


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def nothing_else_changes(client: AsyncClient, expected: tuple[int, ...]) -> AsyncIterator[None]:
    """A request that runs meanwhile and one that follows get what they would have got."""
    epoch = (await client.describe()).epoch
    meanwhile = asyncio.create_task(client.complete(PROMPT, max_tokens=len(expected), **GOOD))
    yield
    async with asyncio.timeout(20):
        assert (await meanwhile).token_ids == expected
        assert (await client.complete(PROMPT, max_tokens=2, **GOOD)).token_ids == expected[:2]
    after = await client.describe()
    assert (after.state, after.epoch) == ("ready", epoch)
    assert after.num_free_pages == after.num_pages
    assert (after.num_running, after.num_waiting, after.num_requests_failed) == (0, 0, 0)


INVALID: dict[str, tuple[Any, dict[str, Any], str]] = {
    "empty text": ("", {}, "prompt is empty"),
    "no token ids": ([], {}, "prompt is empty"),
    "token id": ([1, 4096], {}, "4096"),
    "long text": ("peace and war " * 100, {}, "exceed the context of 128"),
    "long token ids": ([5] * MAX_CONTEXT, {"max_tokens": 1}, "at most 127 tokens"),
    "context": (PROMPT, {"max_tokens": MAX_CONTEXT}, "lower max_tokens to"),
    "no tokens": (PROMPT, {"max_tokens": 0}, "max_tokens"),
    "negative max_tokens": (PROMPT, {"max_tokens": -1}, "max_tokens"),
    "NaN temperature": (PROMPT, {"temperature": math.nan}, "temperature must be"),
    "infinite temperature": (PROMPT, {"temperature": math.inf}, "temperature must be"),
    "negative temperature": (PROMPT, {"temperature": -0.1}, "temperature must be"),
    "top_p": (PROMPT, {"top_p": 1.1}, "top_p must be"),
    "zero top_p": (PROMPT, {"top_p": 0.0}, "top_p must be"),
    "top_k": (PROMPT, {"top_k": -1}, "top_k"),
    "min_p": (PROMPT, {"min_p": math.nan}, "min_p must be"),
    "repetition_penalty": (PROMPT, {"repetition_penalty": 0.0}, "repetition_penalty must be"),
    "presence_penalty": (PROMPT, {"presence_penalty": math.inf}, "presence_penalty must be"),
    "seed": (PROMPT, {"seed": 2**64}, "seed"),
    "logit_bias token": (PROMPT, {"logit_bias": {4096: 1.0}}, "logit_bias names token id 4096"),
    "logit_bias value": (PROMPT, {"logit_bias": {7: math.nan}}, "logit_bias of token id 7"),
    "logprobs": (PROMPT, {"logprobs": 65}, "num_logprobs must be"),
    "prompt_logprobs": (PROMPT, {"prompt_logprobs": 1000}, "num_prompt_logprobs must be"),
    "num_completions": (PROMPT, {"num_completions": 129}, "num_completions must be at most"),
    "never enough pages": (PROMPT, {"num_completions": 50, "max_tokens": 100}, "--kv-memory"),
    "empty stop string": (PROMPT, {"stop": ["fine", ""]}, "stop string must not be empty"),
    "long stop string": (PROMPT, {"stop": "x" * 2000}, "stop string may have at most"),
    "many stop strings": (PROMPT, {"stop": ["x"] * 100}, "at most 64 stop strings"),
    "stop_token_ids": (PROMPT, {"stop_token_ids": [4096]}, "stop_token_ids has token id 4096"),
    "request_id": (PROMPT, {"request_id": "x" * 129}, "request_id is longer"),
    "chat": ([ChatMessage("user", "Hello")], {}, "no chat template"),
    "large prompt": ("x" * 60 * MEGABYTE, {}, "too many for a context of 128"),
    "larger than a message": ("x" * 100 * MEGABYTE, {}, "too large"),
}


@pytest.mark.parametrize("name", INVALID)
async def test_invalid_request_is_refused(name: str, client: AsyncClient) -> None:
    prompt, options, message = INVALID[name]
    with pytest.raises(InvalidRequestError, match=message):
        await client.complete(prompt, **options)


async def test_unknown_model_is_not_found(client: AsyncClient) -> None:
    for call in (client.complete(PROMPT, model="gpt-5"), client.tokenize(PROMPT, model="gpt-5")):
        with pytest.raises(NotFoundError, match="this server serves 'bloom-tiny'"):
            await call


async def test_tokenizing_checks_what_it_gets(client: AsyncClient) -> None:
    with pytest.raises(InvalidRequestError, match="4096"):
        await client.detokenize([4096])
    with pytest.raises(InvalidRequestError, match="too many for a context"):
        await client.tokenize("x" * MEGABYTE)


async def refusal_of(cluster: LocalCluster, request: service.GenerateRequest, *metadata: tuple[str, str]) -> Any:
    """Return the error that a request gets which our own client cannot send."""
    async with grpc.aio.insecure_channel(cluster.address, options=(("grpc.enable_http_proxy", 0),)) as channel:
        call = service_grpc.GenerationServiceStub(channel).Generate(request, metadata=metadata, timeout=10)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        return from_rpc_error(caught.value)


RAW: dict[str, tuple[service.GenerateRequest, str]] = {
    "no prompt": (service.GenerateRequest(), "has no prompt"),
    "empty chat": (service.GenerateRequest(chat=generation.ChatMessages()), "at least one message"),
    "resume_offset": (service.GenerateRequest(text=PROMPT, resume_offset=3), "resume_offset is reserved"),
}


@pytest.mark.parametrize("name", RAW)
async def test_what_no_client_of_ours_sends_is_refused(name: str, cluster: LocalCluster) -> None:
    request, message = RAW[name]
    error = await refusal_of(cluster, request)
    assert isinstance(error, InvalidRequestError)
    assert message in error.message


async def test_another_protocol_version_is_told_which_side_to_upgrade(cluster: LocalCluster) -> None:
    error = await refusal_of(cluster, service.GenerateRequest(text=PROMPT), (PROTOCOL_KEY, "999"))
    assert isinstance(error, IncompatibleVersionError)
    assert "upgrade this server" in error.message


async def test_the_id_of_a_live_request_is_refused_and_the_live_one_goes_on(client: AsyncClient, gate: Gate) -> None:
    live = client.generate(PROMPT, max_tokens=20, ignore_eos=True, request_id="twin")
    await anext(live)
    with gate, pytest.raises(InvalidRequestError, match="'twin' is that of a live request"):
        await client.complete(PROMPT, request_id="twin")
    num_tokens = 1 + sum([len(piece.token_ids) async for piece in live])
    assert num_tokens == 20
    again = await client.complete(PROMPT, max_tokens=2, ignore_eos=True, request_id="twin")
    assert len(again.token_ids) == 2


async def fill_queue(client: AsyncClient, stack: AsyncExitStack) -> list[asyncio.Task[Any]]:
    """Start requests until they hold every page and as many others wait as may."""
    tasks = []
    while (await client.describe()).num_waiting < MAX_WAITING:
        has_begun = asyncio.Event()
        request = client.complete(
            PROMPT, max_tokens=100, ignore_eos=True, on_progress=lambda _, begun=has_begun: begun.set()
        )
        tasks.append(asyncio.create_task(request))
        stack.callback(tasks[-1].cancel)
        async with asyncio.timeout(10):
            await has_begun.wait()
    return tasks


async def test_full_queue_refuses_more_and_serves_the_others(client: AsyncClient, gate: Gate) -> None:
    async with AsyncExitStack() as stack:
        with gate:
            tasks = await fill_queue(client, stack)
            with pytest.raises(OverloadedError, match="2 requests are waiting already") as caught:
                await client.complete(PROMPT)
            assert caught.value.reason == "QUEUE_FULL"
            with pytest.raises(InvalidRequestError):  # what never works is told even then
                await client.complete(PROMPT, max_tokens=MAX_CONTEXT)
        completions = await asyncio.gather(*tasks)
    assert {len(completion.token_ids) for completion in completions} == {100}

"""The rest of the client-facing service: aborting, queueing, chats, descriptions, health, reflection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cluster.client import AsyncClient, ChatMessage, FinishReason, Progress
from cluster.errors import InvalidRequestError, NotFoundError
from cluster.wire.channels import client_channel
from coordinator.coordinator import HEALTH_NAME
from tests.checkpoints import make_checkpoint
from tests.integration.local_cluster import LocalCluster, local_cluster

PROMPT = "The state of the Union"


@pytest.fixture
async def cluster() -> AsyncIterator[LocalCluster]:
    """It generates one sequence at a time."""
    async with local_cluster("bloom-tiny", 2, max_running=1) as running:
        yield running


@pytest.fixture
async def client(cluster: LocalCluster) -> AsyncIterator[AsyncClient]:
    async with cluster.client() as connected:
        yield connected


async def test_abort_ends_a_stream_with_its_reason_and_frees_its_pages(
    cluster: LocalCluster, client: AsyncClient
) -> None:
    reasons = []
    async for piece in client.generate(PROMPT, max_tokens=1000, ignore_eos=True, request_id="mine"):
        if piece.token_ids and not reasons:
            await client.abort("mine")
        reasons.append(piece.finish_reason)
    assert reasons[-1] is FinishReason.ABORTED
    await cluster.wait_until_pages_are_free(client)
    with pytest.raises(NotFoundError, match="mine"):
        await client.abort("mine")


async def test_a_queued_request_is_told_its_position_and_can_be_aborted(
    cluster: LocalCluster, client: AsyncClient
) -> None:
    progress: dict[str, list[Progress]] = {name: [] for name in ("second", "third")}
    running = client.generate(PROMPT, max_tokens=1000, ignore_eos=True)
    await anext(running)
    queued = {}
    for name, told in progress.items():
        is_queued = asyncio.Event()

        def note(news: Progress, told: list[Progress] = told, is_queued: asyncio.Event = is_queued) -> None:
            told.append(news)
            is_queued.set()

        completion = client.complete(PROMPT, max_tokens=3, ignore_eos=True, request_id=name, on_progress=note)
        queued[name] = asyncio.create_task(completion)
        async with asyncio.timeout(10):
            await is_queued.wait()
    assert [(told[0].phase, told[0].queue_position) for told in progress.values()] == [("queued", 0), ("queued", 1)]
    status = await client.describe()
    assert (status.num_running, status.num_waiting) == (1, 2)
    await client.abort("third")
    assert (await queued["third"]).finish_reason is FinishReason.ABORTED
    await running.aclose()
    completion = await queued["second"]
    assert len(completion.token_ids) == 3
    assert completion.timings.queue_seconds > 0
    assert [news.phase for news in progress["second"]] == ["queued", "prefill", "decode"]
    await cluster.wait_until_pages_are_free(client)


async def test_tokenizing_and_describing(client: AsyncClient) -> None:
    assert await client.detokenize(await client.tokenize(PROMPT)) == PROMPT
    (model,) = await client.list_models()
    assert (model.name, model.vocab_size, model.has_chat_template) == ("bloom-tiny", 4096, False)
    await client.complete(PROMPT, max_tokens=4)
    status = await client.describe()
    assert (status.state, status.message, status.model) == ("ready", "ready", model)
    assert [(stage.state, stage.worker_id, stage.node_name) for stage in status.stages] == [
        ("ready", "w0", "node-0"),
        ("ready", "w1", "node-1"),
    ]
    assert all(stage.num_steps > 0 and stage.weight_bytes > 0 and stage.kv_bytes > 0 for stage in status.stages)
    assert (status.num_requests_finished, status.num_requests_failed) == (1, 0)


async def test_health_and_reflection_answer(cluster: LocalCluster) -> None:
    async with client_channel(cluster.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", HEALTH_NAME):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        call = stub.ServerReflectionInfo(iter([question]), timeout=10)
        services = {entry.name async for answer in call for entry in answer.list_services_response.service}
        assert HEALTH_NAME in services


async def test_chat_needs_a_template(client: AsyncClient) -> None:
    with pytest.raises(InvalidRequestError, match="no chat template") as caught:
        await client.chat([ChatMessage("user", "Hello")])
    assert caught.value.reason == "NO_CHAT_TEMPLATE"


async def test_chat_continues_what_the_template_writes(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama")
    messages = [ChatMessage("system", "Be brief."), ChatMessage("user", "Hello 🐍")]
    async with local_cluster(folder, 2) as cluster, cluster.client() as client:
        answer = await client.chat(messages, max_tokens=12)
        text = "system: Be brief.\nuser: Hello 🐍\nassistant:"
        assert await client.detokenize(await client.tokenize(messages)) == text
        completion = await client.complete(text, max_tokens=12)
        assert answer == ChatMessage("assistant", completion.text)
        assert (await client.list_models())[0].has_chat_template

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import cast

import pytest

from cluster.catalogue import shipped_folder
from cluster.errors import NotFoundError
from cluster.rpc.v1 import generation_pb2 as generation
from cluster.rpc.v1 import generation_service_pb2 as service
from coordinator import server
from coordinator.engine import Engine
from coordinator.streams import RequestStream
from coordinator.tokenizer import Tokenizer
from tests.coordinator.requests import make_request


class LateStream(RequestStream):
    """Ends in the very moment in which its server gives up waiting for it."""

    async def next(self) -> service.GenerateResponse:
        try:
            return await super().next()
        except asyncio.CancelledError:
            self.finish(generation.Finished(num_prompt_tokens=3))
            raise


class OneRequest:
    """An engine whose scheduler knows its request until it has ended."""

    def __init__(self, stream: RequestStream) -> None:
        self.stream = stream

    def progress_of(self, stream: RequestStream) -> generation.Progress:
        if stream.is_ended:
            raise NotFoundError("there is no live request")
        return generation.Progress(phase=generation.Progress.PHASE_PREFILL)


async def test_request_that_ends_with_a_heartbeat_ends_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEARTBEAT_SECONDS", 0.0)
    stream = LateStream(make_request(), Tokenizer(Path(shipped_folder("bloom-tiny")), 4096))
    engine = cast(Engine, OneRequest(stream))
    responses = [response async for response in server._with_heartbeat(engine, stream)]
    assert [response.finished.num_prompt_tokens for response in responses] == [3]


async def test_a_silent_stream_tells_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEARTBEAT_SECONDS", 0.0)
    stream = RequestStream(make_request(), Tokenizer(Path(shipped_folder("bloom-tiny")), 4096))
    responses = server._with_heartbeat(cast(Engine, OneRequest(stream)), stream)
    assert (await anext(responses)).progress.phase == generation.Progress.PHASE_PREFILL
    stream.finish(generation.Finished())
    assert (await anext(responses)).HasField("finished")
    await responses.aclose()

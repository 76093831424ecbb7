import asyncio
import random
import threading

import pytest

from cluster.client import AsyncClient, ChatMessage, FinishReason, RetryPolicy
from cluster.errors import (
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    RequestCancelledError,
    StageTimeoutError,
    StageUnavailableError,
)
from cluster.rpc.v1 import generation_pb2 as generation
from cluster.rpc.v1 import generation_service_pb2 as service
from cluster.testing.generation import SILENCE, FakeGenerationServer, accepted, end, queued, text


class RecordedSleep:
    """Returns at once and remembers for how long it was asked to sleep."""

    def __init__(self) -> None:
        self.delays: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.delays.append(seconds)


async def test_pieces_come_in_order_and_the_last_tells_why_it_ended():
    with FakeGenerationServer([accepted(), text("Par"), text("is"), *end()]) as server:
        async with AsyncClient(server.address) as client:
            generation_ = client.generate("The capital of France is", max_tokens=5)
            pieces = [piece async for piece in generation_]
    assert [piece.text for piece in pieces] == ["Par", "is", ""]
    assert pieces[0].token_ids == tuple(b"Par")
    assert [piece.finish_reason for piece in pieces] == [None, None, FinishReason.STOP]
    assert generation_.summary is not None
    assert generation_.summary.timings.decode_seconds == 1.0
    assert server.requests[0].request_id == generation_.request_id != ""
    assert server.requests[0].stop.max_tokens == 5


async def test_completion_holds_all_choices_usage_and_fingerprint():
    script = [
        accepted(),
        text("b", completion_index=1),
        text("a"),
        text("B", completion_index=1),
        *end(FinishReason.LENGTH, num_completions=2, num_completion_tokens=3),
    ]
    with FakeGenerationServer(script) as server:
        async with AsyncClient(server.address) as client:
            completion = await client.complete("x", num_completions=2)
    assert [choice.text for choice in completion.choices] == ["a", "bB"]
    assert completion.text == "a"
    assert completion.token_ids == tuple(b"a")
    assert completion.finish_reason is FinishReason.LENGTH
    assert completion.usage.num_completion_tokens == 3
    assert completion.fingerprint.model == "fake"


async def test_prompt_text_comes_back_only_with_echo():
    echo = service.GenerateResponse(prompt_echo=generation.PromptEcho(text="Hi", token_ids=[7, 8]))
    with FakeGenerationServer([accepted(), echo, text("!"), *end()]) as server:
        async with AsyncClient(server.address) as client:
            echoed = await client.complete("Hi", echo=True)
            scored = await client.complete("Hi", prompt_logprobs=0)
    assert echoed.prompt is not None
    assert scored.prompt is not None
    assert (echoed.prompt.text, scored.prompt.text) == ("Hi", "")
    assert scored.prompt.token_ids == (7, 8)
    assert echoed.text == scored.text == "!"


async def test_logprobs_are_read():
    entry = generation.TokenLogprobs(token_id=5, logprob=-0.5, top_token_ids=[5, 6], top_logprobs=[-0.5, -1.0])
    first = generation.TokenLogprobs(token_id=4)
    message = service.GenerateResponse(piece=generation.Piece(text="x", token_ids=[4, 5], logprobs=[first, entry]))
    with FakeGenerationServer([message, *end()]) as server:
        async with AsyncClient(server.address) as client:
            completion = await client.complete("x", logprobs=2)
    assert completion.logprobs[0].logprob is None
    assert completion.logprobs[1].top_token_ids == (5, 6)
    assert server.requests[0].logprobs.num_logprobs == 2


async def test_progress_is_told_and_is_no_piece():
    seen = []
    with FakeGenerationServer([accepted(), queued(3), text("x"), *end()]) as server:
        async with AsyncClient(server.address) as client:
            completion = await client.complete("x", on_progress=seen.append)
    assert [(progress.phase, progress.queue_position) for progress in seen] == [("queued", 3)]
    assert completion.text == "x"


async def test_chat_returns_the_next_message():
    with FakeGenerationServer() as server:
        async with AsyncClient(server.address) as client:
            answer = await client.chat([ChatMessage("user", "Hi")], temperature=0)
    assert answer == ChatMessage("assistant", "Hello, world")
    assert server.requests[0].chat.messages[0].content == "Hi"


async def test_error_of_the_server_keeps_its_class_reason_and_sentence():
    with FakeGenerationServer([OverloadedError("the queue holds 4 of 4 requests", reason="QUEUE_FULL")]) as server:
        async with AsyncClient(server.address) as client:
            with pytest.raises(OverloadedError, match="holds 4 of 4") as caught:
                await client.complete("x")
    assert caught.value.reason == "QUEUE_FULL"


async def test_unreachable_server_is_retried_before_the_first_message():
    unavailable = [StageUnavailableError("stage 1 restarts")]
    sleep = RecordedSleep()
    with FakeGenerationServer(unavailable, unavailable, [text("x"), *end()]) as server:
        async with AsyncClient(server.address, sleep=sleep, source=random.Random(0)) as client:
            assert (await client.complete("x")).text == "x"
    assert len(server.requests) == 3
    assert 0.1 <= sleep.delays[0] <= 0.2 <= sleep.delays[1] <= 0.4


@pytest.mark.parametrize("first", [queued(1), text("x")])
async def test_nothing_is_retried_after_the_first_message(first):
    sleep = RecordedSleep()
    with FakeGenerationServer([first, StageUnavailableError("stage 1 is lost")]) as server:
        async with AsyncClient(server.address, sleep=sleep) as client:
            with pytest.raises(StageUnavailableError, match="stage 1 is lost"):
                await client.complete("x")
    assert len(server.requests) == 1
    assert sleep.delays == []


async def test_other_errors_are_not_retried():
    sleep = RecordedSleep()
    with FakeGenerationServer([OverloadedError("full")]) as server:
        async with AsyncClient(server.address, sleep=sleep) as client:
            with pytest.raises(OverloadedError):
                await client.complete("x")
    assert len(server.requests) == 1
    assert sleep.delays == []


async def test_retries_are_bounded_and_the_error_names_the_address():
    with FakeGenerationServer() as server:
        address = server.address
    sleep = RecordedSleep()
    async with AsyncClient(address, sleep=sleep, retry=RetryPolicy(max_attempts=3)) as client:
        with pytest.raises(StageUnavailableError, match=f"no server answers at {address}.*cluster serve"):
            await client.complete("x")
        assert len(sleep.delays) == 2
        with pytest.raises(StageUnavailableError, match=address):
            await client.describe()


async def test_silence_is_a_timeout_and_ends_the_request():
    with FakeGenerationServer([accepted(), text("x"), SILENCE]) as server:
        async with AsyncClient(server.address, silence_timeout=0.05) as client:
            stream = client.generate("x")
            assert (await anext(stream)).text == "x"
            with pytest.raises(StageTimeoutError, match=r"sent nothing for 0\.05 s"):
                await anext(stream)
            assert await asyncio.to_thread(server.wait_cancelled)


async def test_silence_timeout_does_not_bound_the_whole_request():
    release = threading.Event()
    release.set()
    script = [accepted(), *[step for _ in range(5) for step in (queued(1), release)], text("x"), *end()]
    with FakeGenerationServer(script) as server:
        async with AsyncClient(server.address, silence_timeout=None) as client:
            assert (await client.complete("x", silence_timeout=30.0)).text == "x"


async def test_closing_a_generation_cancels_the_call():
    with FakeGenerationServer([text("x"), SILENCE]) as server:
        async with AsyncClient(server.address) as client:
            async with client.generate("x") as stream:
                assert (await anext(stream)).text == "x"
            assert await asyncio.to_thread(server.wait_cancelled)
            with pytest.raises(StopAsyncIteration):
                await anext(stream)


async def test_breaking_out_of_the_loop_cancels_the_call():
    with FakeGenerationServer([text("x"), SILENCE]) as server:
        async with AsyncClient(server.address) as client:
            async for _ in client.generate("x"):
                break
            assert await asyncio.to_thread(server.wait_cancelled)


async def test_cancelling_the_task_cancels_the_call():
    with FakeGenerationServer([text("x"), SILENCE]) as server:
        async with AsyncClient(server.address) as client:
            stream = client.generate("x")
            await anext(stream)
            task = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(server.wait_cancelled)


async def test_closing_from_another_task_wakes_the_waiting_one():
    with FakeGenerationServer([text("x"), SILENCE]) as server:
        async with AsyncClient(server.address) as client:
            stream = client.generate("x", request_id="r1")
            await anext(stream)
            task = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            await stream.aclose()
            with pytest.raises(RequestCancelledError, match="r1"):
                await task


async def test_stream_that_stops_early_is_an_error():
    with FakeGenerationServer([accepted(), text("x")]) as server:
        async with AsyncClient(server.address) as client:
            with pytest.raises(StageUnavailableError, match="before its end"):
                await client.complete("x")


async def test_many_prompts_keep_their_order():
    scripts = [[text("a"), *end()], [text("b"), *end()], [text("c"), *end()]]
    with FakeGenerationServer(*scripts) as server:
        async with AsyncClient(server.address) as client:
            completions = await client.complete_many(["1", "2", "3"], concurrency=1, max_tokens=4)
    assert [completion.text for completion in completions] == ["a", "b", "c"]
    assert [request.text for request in server.requests] == ["1", "2", "3"]


async def test_many_prompts_fit_their_results_whatever_the_concurrency():
    with FakeGenerationServer() as server:
        async with AsyncClient(server.address) as client:
            completions = await client.complete_many([str(number) for number in range(40)], concurrency=8)
    sent = {request.request_id: request.text for request in server.requests}
    assert [sent[completion.request_id] for completion in completions] == [str(number) for number in range(40)]


async def test_first_error_of_many_prompts_is_raised_as_itself():
    with FakeGenerationServer([OverloadedError("full")]) as server:
        async with AsyncClient(server.address) as client:
            with pytest.raises(OverloadedError, match="full"):
                await client.complete_many(["1", "2"])


async def test_small_calls():
    with FakeGenerationServer() as server:
        async with AsyncClient(server.address) as client:
            assert await client.tokenize("ab") == (97, 98)
            assert await client.detokenize([97, 98]) == "ab"
            assert (await client.list_models())[0].name == "fake"
            status = await client.describe()
            with pytest.raises(NotFoundError, match="nobody"):
                await client.abort("nobody")
            await client.complete("x", request_id="mine")
            await client.abort("mine")
    assert status.state == "ready"
    assert [(stage.state, stage.numerics.end_block) for stage in status.stages] == [("ready", 2), ("ready", 4)]
    assert status.stages[0].hop_seconds is None
    assert server.aborted_ids == ["mine"]


async def test_request_larger_than_a_message_is_invalid():
    with FakeGenerationServer() as server:
        async with AsyncClient(server.address) as client:
            with pytest.raises(InvalidRequestError, match="too large"):
                await client.complete("x" * 70_000_000)
    assert server.requests == []

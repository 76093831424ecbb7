import asyncio
import gc
import os
import signal
import threading

import pytest

from cluster.client import ChatMessage, Client
from cluster.errors import OverloadedError, StageTimeoutError
from cluster.testing.generation import SILENCE, FakeGenerationServer, accepted, end, text


def test_pieces_stream_without_asyncio():
    with FakeGenerationServer([accepted(), text("a"), text("b"), *end()]) as server, Client(server.address) as client:
        stream = client.generate("x", max_tokens=3)
        assert "".join(piece.text for piece in stream) == "ab"
        assert stream.summary is not None
        assert server.requests[0].request_id == stream.request_id


def test_every_call_of_the_async_client_has_a_blocking_one():
    with FakeGenerationServer() as server, Client(server.address) as client:
        assert client.complete("x", request_id="r").text == "Hello, world"
        assert client.chat([ChatMessage("user", "x")]).content == "Hello, world"
        assert [completion.text for completion in client.complete_many(["x", "y"])] == ["Hello, world"] * 2
        assert client.detokenize(client.tokenize("ab")) == "ab"
        assert client.list_models()[0].has_chat_template
        assert client.describe().state == "ready"
        client.abort("r")
    assert server.aborted_ids == ["r"]


def test_works_in_a_thread_and_from_several_at_once():
    texts = []
    with FakeGenerationServer() as server, Client(server.address) as client:
        threads = [threading.Thread(target=lambda: texts.append(client.complete("x").text)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert texts == ["Hello, world"] * 4


async def test_works_inside_a_running_loop():
    assert asyncio.get_running_loop().is_running()
    with FakeGenerationServer() as server, Client(server.address) as client:
        assert client.complete("x").text == "Hello, world"


def test_errors_come_out_as_themselves():
    with FakeGenerationServer([OverloadedError("full")]) as server, Client(server.address) as client:
        with pytest.raises(OverloadedError, match="full"):
            client.complete("x")
        with pytest.raises(TypeError, match="max_token"):
            client.complete("x", max_token=3)  # type: ignore[call-arg]


def test_silence_is_a_timeout():
    with FakeGenerationServer([accepted(), SILENCE]) as server, Client(server.address, silence_timeout=0.05) as client:
        with pytest.raises(StageTimeoutError):
            client.complete("x")
        assert server.wait_cancelled()


def test_leaving_the_loop_early_aborts_the_request():
    with FakeGenerationServer([text("x"), SILENCE]) as server, Client(server.address) as client:
        with client.generate("x") as stream:
            next(stream)
        assert server.wait_cancelled()


def test_dropping_the_iterator_aborts_the_request():
    with FakeGenerationServer([text("x"), SILENCE]) as server, Client(server.address) as client:
        for _ in client.generate("x"):
            break
        gc.collect()
        assert server.wait_cancelled()


def test_ctrl_c_aborts_the_request_and_the_client_goes_on():
    with FakeGenerationServer([text("x"), SILENCE], [text("y"), *end()]) as server, Client(server.address) as client:
        stream = client.generate("x")
        next(stream)
        timer = threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGINT])
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            next(stream)
        stream.close()
        assert server.wait_cancelled()
        assert client.complete("x").text == "y"


def test_closing_ends_the_thread_and_further_use_is_refused():
    with FakeGenerationServer() as server:
        before = set(threading.enumerate())
        client = Client(server.address)
        started = set(threading.enumerate()) - before
        client.complete("x")
        client.close()
        client.close()
        assert not any(thread.is_alive() for thread in started if thread.name == "spanwise-client")
        with pytest.raises(RuntimeError, match="closed"):
            client.complete("x")

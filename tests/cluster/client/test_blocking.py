import asyncio
import gc
import os
import signal
import threading

import pytest

from cluster.client import ChatMessage, Client
from cluster.errors import OverloadedError, RequestCancelledError, StageTimeoutError
from cluster.testing.generation import SILENCE, FakeGenerationServer, accepted, end, queued, text


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


def _client_threads():
    return [thread for thread in threading.enumerate() if thread.name == "spanwise-client"]


def test_closing_ends_a_call_under_way_as_cancelled():
    with FakeGenerationServer([queued(1), SILENCE]) as server, Client(server.address) as client:
        closing = []

        def close_from_another_thread(_):
            closing.append(threading.Thread(target=client.close))
            closing[0].start()

        with pytest.raises(RequestCancelledError, match="closed"):
            client.complete("x", on_progress=close_from_another_thread)
        closing[0].join()


def test_a_generation_of_a_closed_client_may_be_closed():
    with FakeGenerationServer([accepted(), text("x"), SILENCE]) as server, Client(server.address) as client:
        with client.generate("x") as stream:
            next(stream)
            client.close()
        stream.close()
        assert server.wait_cancelled()


def test_several_threads_may_close_at_once():
    with FakeGenerationServer() as server:
        client, raised = Client(server.address), []

        def close():
            try:
                client.close()
            except Exception as error:
                raised.append(error)

        closing = [threading.Thread(target=close) for _ in range(4)]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join()
        assert not raised


def test_a_client_that_nothing_refers_to_ends_its_thread():
    with FakeGenerationServer() as server:
        client = Client(server.address)
        client.complete("x")
        threads = _client_threads()
        del client
        gc.collect()
        for thread in threads:
            thread.join(10)
        assert threads
        assert not _client_threads()


def test_a_generation_keeps_its_client_open():
    with FakeGenerationServer([accepted(), text("a"), text("b"), *end()]) as server:
        stream = Client(server.address).generate("x")
        gc.collect()
        assert "".join(piece.text for piece in stream) == "ab"

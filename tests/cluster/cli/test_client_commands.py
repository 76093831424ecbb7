"""status, models, generate and chat against the fake server."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from cluster.cli.local_runs import run_store
from cluster.cli.progress import describe
from cluster.client import Progress
from cluster.errors import OverloadedError
from cluster.rpc.v1 import generation_service_pb2 as service
from cluster.runs import RunRecord, process_started
from cluster.testing.generation import SILENCE, FakeGenerationServer, accepted, end, queued, ready_status, text


@pytest.fixture
def closed_address():
    server = FakeGenerationServer()
    with server:
        pass
    return server.address


def record_of(address, **changes):
    record = RunRecord(os.getpid(), process_started(os.getpid()), address, "bloom-tiny", "/logs")
    return replace(record, **changes)


def test_status_shows_stages_spans_and_load(run):
    with FakeGenerationServer() as server:
        result = run("status", "--server", server.address)
    assert result.exit_code == 0
    for word in ("fake", "ready", "0-1", "2-3", "fp32", "3.0 MiB", "4.0 GiB", "tok/s", "KV pages"):
        assert word in result.output


def test_status_json_is_machine_readable(run):
    with FakeGenerationServer() as server:
        result = run("status", "--json", env={"SPANWISE_SERVER": server.address})
    status = json.loads(result.output)
    assert status["state"] == "ready"
    assert status["stages"][1]["numerics"]["end_block"] == 4


def test_status_of_a_failed_cluster_says_so_and_exits_with_1(run):
    failed = ready_status()
    failed.state = service.CLUSTER_STATE_FAILED
    failed.message = "stage 1 on node-b is lost"
    with FakeGenerationServer(status=failed) as server:
        result = run("status", "-s", server.address)
    assert result.exit_code == 1
    assert "stage 1 on node-b is lost" in result.output


def test_status_without_server_says_what_to_do(run, closed_address):
    result = run("status", "--server", closed_address)
    assert result.exit_code == 1
    assert f"no server answers at {closed_address}" in result.stderr.replace("\n", " ")
    assert "cluster serve" in result.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": "failed", "message": "stage 1 died"}, "failed: stage 1 died"),
        ({"state": "starting"}, "is starting and does not answer yet"),
        ({"state": "ready"}, "was ready and does not answer now"),
        ({"state": "draining"}, "is shutting down"),
        ({"state": "stopped", "process_started": "1"}, "was stopped"),
        ({"state": "ready", "process_started": "1"}, "died without a word"),
    ],
)
def test_status_without_server_tells_what_became_of_the_run(run, closed_address, changes, message):
    run_store().write(record_of(closed_address, **changes))
    result = run("status", "--server", closed_address)
    assert result.exit_code == 1
    assert message in result.stderr


def test_models_lists_the_catalogue_and_what_is_served(run, closed_address):
    with FakeGenerationServer() as server:
        result = run("models", "--server", server.address)
        listed = json.loads(run("models", "--json", "--server", server.address).output)
    assert "bloom-560m" in result.output
    assert f"served at {server.address}: fake" in result.output
    assert listed["served"][0]["name"] == "fake"
    assert any(entry["alias"] == "bloom-tiny" for entry in listed["catalogue"])
    assert "no server answers" in run("models", "--server", closed_address).output


def test_generate_streams_text_to_stdout_and_progress_to_stderr(run):
    with FakeGenerationServer([accepted(), queued(2), text("Par"), text("is"), *end()]) as server:
        result = run(
            "generate", "France:", "--server", server.address, "--max-tokens", 3, "--temperature", 0, "--seed", 1
        )
    assert result.exit_code == 0
    assert result.stdout == "Paris\n"
    assert "waiting behind 2 requests" in result.stderr
    request = server.requests[0]
    assert (request.text, request.stop.max_tokens, request.sampling.seed) == ("France:", 3, 1)
    assert request.sampling.HasField("temperature")
    assert not request.sampling.HasField("top_p")


def test_generate_reads_stdin_and_escapes_in_stop(run):
    with FakeGenerationServer() as server:
        run("generate", "-", "--server", server.address, "--stop", "\\n", input="two\nlines")
    assert server.requests[0].text == "two\nlines"
    assert list(server.requests[0].stop.stop_strings) == ["\n"]


def test_generate_json_holds_text_reason_usage_and_fingerprint(run):
    with FakeGenerationServer() as server:
        result = run("generate", "x", "--json", "--server", server.address)
    completion = json.loads(result.stdout)
    assert completion["choices"][0]["text"] == "Hello, world"
    assert completion["choices"][0]["finish_reason"] == "stop"
    assert completion["summary"]["fingerprint"]["model"] == "fake"


def test_generate_prints_several_completions_apart(run):
    script = [text("a"), text("b", completion_index=1), *end(num_completions=2)]
    with FakeGenerationServer(script) as server:
        result = run("generate", "x", "-n", 2, "--server", server.address)
    assert result.stdout == "--- 1 of 2\na\n--- 2 of 2\nb\n"


def test_generate_tells_an_error_and_keeps_what_came(run):
    with FakeGenerationServer([text("half"), OverloadedError("the queue is full")]) as server:
        result = run("generate", "x", "--server", server.address)
    assert result.exit_code == 1
    assert result.stdout == "half\n"
    assert "the queue is full" in result.stderr


def test_generate_writes_nothing_to_stdout_when_nothing_came(run):
    with FakeGenerationServer([OverloadedError("full")]) as server:
        assert run("generate", "x", "--server", server.address).stdout == ""


def test_ctrl_c_aborts_the_request_and_exits_with_130():
    with FakeGenerationServer([text("begun"), SILENCE]) as server:
        command = [sys.executable, "-m", "cluster.cli", "generate", "x", "--server", server.address]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.read(5) == b"begun"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert server.wait_cancelled()
    assert process.returncode == 130
    assert errors == b""


def test_chat_keeps_the_history(run):
    with FakeGenerationServer([text("one"), *end()], [text("two"), *end()], [text("new"), *end()]) as server:
        lines = "first\n\nsecond\n/reset\nthird\n/quit\nnever\n"
        result = run("chat", "--system", "Be brief.", "--server", server.address, input=lines)
    assert result.exit_code == 0
    assert result.stdout == "one\ntwo\nnew\n"
    histories = [[(m.role, m.content) for m in request.chat.messages] for request in server.requests]
    system = ("system", "Be brief.")
    assert histories == [
        [system, ("user", "first")],
        [system, ("user", "first"), ("assistant", "one"), ("user", "second")],
        [system, ("user", "third")],
    ]


def test_chat_goes_on_after_an_error_without_the_lost_turn(run):
    with FakeGenerationServer([OverloadedError("full")], [text("ok"), *end()]) as server:
        result = run("chat", "--server", server.address, input="first\nsecond\n")
    assert result.exit_code == 0
    assert "full" in result.stderr
    assert [m.content for m in server.requests[1].chat.messages] == ["second"]


def test_chat_with_a_model_without_template_says_so(run):
    with FakeGenerationServer(has_chat_template=False) as server:
        result = run("chat", "--server", server.address, input="hello\n")
    assert result.exit_code == 1
    assert "fake has no chat template" in result.stderr
    assert server.requests == []


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said():
    with FakeGenerationServer([text("begun"), SILENCE], [text("more"), *end()]) as server:
        command = [sys.executable, "-m", "cluster.cli", "chat", "--server", server.address]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, bufsize=0, **pipes)
        process.stdin.write(b"one\n")
        assert process.stdout.read(5) == b"begun"
        process.send_signal(signal.SIGINT)
        assert server.wait_cancelled()
        rest, _ = process.communicate(b"two\n", timeout=30)
    assert process.returncode == 0
    assert rest == b" [stopped]\nmore\n"
    assert [m.content for m in server.requests[1].chat.messages] == ["one", "begun", "two"]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (("queued", 1, 0, 9, 0, 4), "waiting behind 1 request"),
        (("prefill", 0, 3, 9, 0, 4), "reading the prompt: 3 of 9 tokens"),
        (("prefill", 0, 3, 9, 2, 4), "reading the prompt: 3 of 9 tokens, block 2 of 4"),
        (("decode", 0, 9, 9, 2, 4), "writing, block 2 of 4"),
        (("decode", 0, 9, 9, 0, 4), ""),
    ],
)
def test_progress_in_words(values, line):
    assert describe(Progress(*values)) == line

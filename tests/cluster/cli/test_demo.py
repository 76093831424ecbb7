import sys
import types

import pytest

from cluster.cli import demo as demo_command
from cluster.errors import OverloadedError
from cluster.rpc.v1 import generation_service_pb2 as service
from cluster.testing.generation import FakeGenerationServer, accepted, end, ready_status, text


@pytest.fixture
def serve_with(monkeypatch):
    """Let the fake server stand for what `cluster.serve.run` starts."""

    def install(server, *, status=None, exit_status=0):
        def run(config, *, on_status, on_note, stop):
            assert (config.model, config.workers, config.address) == ("bloom-tiny", 3, "local")
            on_note("starting")
            on_status(status or ready_status())
            on_status(status or ready_status())
            if status is None:
                assert stop.wait(10.0)
            return exit_status

        monkeypatch.setitem(sys.modules, "cluster.serve", types.SimpleNamespace(run=run))
        monkeypatch.setattr("cluster.cli.foreground.client_address", lambda _: server.address)
        monkeypatch.setattr("cluster.logs.configure_logging", lambda *_, **__: None)

    return install


def test_demo_streams_text_once_and_shuts_down(run, serve_with):
    with FakeGenerationServer([accepted(), text(" is"), text(" strong"), *end()]) as server:
        serve_with(server)
        result = run("demo", "Our Union")
    assert result.exit_code == 0
    assert "Our Union is strong" in result.stdout
    assert len(server.requests) == 1


def test_demo_tells_what_went_wrong_with_the_text(run, serve_with):
    with FakeGenerationServer([OverloadedError("the queue is full")]) as server:
        serve_with(server, exit_status=0)
        result = run("demo")
    assert result.exit_code == 1
    assert "the queue is full" in result.stderr


def test_demo_of_a_cluster_that_fails_exits_with_its_status(run, serve_with):
    failed = ready_status()
    failed.state = service.CLUSTER_STATE_FAILED
    with FakeGenerationServer() as server:
        serve_with(server, status=failed, exit_status=1)
        result = run("demo")
    assert result.exit_code == 1
    assert demo_command.DEFAULT_PROMPT not in result.stdout

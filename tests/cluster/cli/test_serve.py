"""serve in the foreground and detached, with something else in the place of `cluster.serve.run`."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from cluster.cli import detached, foreground
from cluster.cli.foreground import client_address, how_to_use, serve_here, with_place
from cluster.cli.local_runs import run_store
from cluster.config import ServeConfig
from cluster.errors import ConfigurationError
from cluster.rpc.v1 import generation_service_pb2 as service
from cluster.testing.generation import FakeGenerationServer, ready_status


@pytest.fixture(autouse=True)
def _no_log_handlers(monkeypatch):
    monkeypatch.setattr(foreground, "configure_logging", lambda *_, **__: None)


@pytest.fixture
def config():
    return with_place(ServeConfig(model="bloom-tiny", port=0))


def loading():
    status = ready_status()
    status.state = service.CLUSTER_STATE_LOADING
    return status


def failed():
    status = ready_status()
    status.state = service.CLUSTER_STATE_FAILED
    status.message = "stage 1 is lost"
    return status


def test_record_follows_the_run_from_start_to_stop(config, capsys):
    states = []

    def run(_, *, on_status, on_note, stop):
        assert not stop.is_set()
        states.append(run_store().read(config.port))
        on_note("starting Ray")
        for status in (loading(), ready_status(), ready_status()):
            on_status(status)
            states.append(run_store().read(config.port))
        return 0

    assert serve_here(config, run) == 0
    assert [record.state for record in states] == ["starting", "starting", "ready", "ready"]
    assert states[0].is_alive
    assert states[1].worker_ids == ("w0", "w1")
    assert run_store().read(config.port).state == "stopped"
    output = capsys.readouterr().out
    assert "starting Ray" in output
    assert output.count("ready at 127.0.0.1") == 1
    assert f'cluster generate "Once upon a time" --server 127.0.0.1:{config.port}' in output.replace("\n", " ")


def test_lost_stage_is_left_in_the_record(config, capsys):
    def run(_, *, on_status, **__):
        on_status(ready_status())
        on_status(failed())
        return 1

    assert serve_here(config, run) == 1
    record = run_store().read(config.port)
    assert (record.state, record.message) == ("failed", "stage 1 is lost")
    assert "stage 1 is lost" in capsys.readouterr().out


def draining():
    return service.DescribeClusterResponse(state=service.CLUSTER_STATE_DRAINING, message="shutting down")


def test_shutting_down_is_told_and_recorded_and_the_logs_are_still_found(config, capsys):
    records = []

    def run(_, *, on_status, **__):
        for status in (ready_status(), draining()):
            on_status(status)
            records.append(run_store().read(config.port))
        return 0

    assert serve_here(config, run) == 0
    assert [record.state for record in records] == ["ready", "draining"]
    assert records[1].worker_ids == ("w0", "w1")
    assert capsys.readouterr().out.endswith("shutting down\n")


def test_why_it_failed_is_kept_while_shutting_down(config):
    def run(_, *, on_status, **__):
        for status in (failed(), draining()):
            on_status(status)
        return 1

    assert serve_here(config, run) == 1
    record = run_store().read(config.port)
    assert (record.state, record.message) == ("failed", "stage 1 is lost")


@pytest.mark.parametrize(
    ("error", "state", "message"),
    [
        (ConfigurationError("no such model"), "failed", "no such model"),
        (RuntimeError("bug"), "failed", "RuntimeError: bug"),
        (KeyboardInterrupt(), "stopped", ""),
    ],
)
def test_error_before_serving_is_left_in_the_record(config, error, state, message):
    def run(_, **__):
        raise error

    with pytest.raises(type(error)):
        serve_here(config, run)
    record = run_store().read(config.port)
    assert (record.state, record.message) == (state, message)


def test_port_0_becomes_a_free_port_and_logs_get_a_place(config, state_home):
    assert config.port > 0
    assert config.log_dir == str(state_home / "spanwise" / "logs" / str(config.port))
    assert with_place(replace(config, log_dir="logs")).log_dir == os.path.abspath("logs")


def test_second_server_on_a_port_is_refused_before_anything_starts(config, monkeypatch):
    with foreground.RecordKeeper(run_store(), config):
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with pytest.raises(ConfigurationError, match=f"already served on port {config.port} .*`cluster stop"):
            with_place(config)


@pytest.mark.parametrize(
    ("host", "address"),
    [("127.0.0.1", "127.0.0.1:7050"), ("0.0.0.0", "127.0.0.1:7050"), ("::", "[::1]:7050"), ("node1", "node1:7050")],
)
def test_address_that_a_client_here_dials(host, address):
    assert client_address(ServeConfig(model="m", host=host)) == address


def test_default_address_needs_no_flag():
    assert "--server" not in how_to_use(ServeConfig(model="m"))


def test_missing_server_packages_are_named_with_the_command_to_get_them(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in [
        name for name in sys.modules if name.split(".")[0] in ("coordinator", "worker") or name == "cluster.serve"
    ]:
        monkeypatch.delitem(sys.modules, name)
    result = run("serve", "bloom-tiny", "--port", 0)
    assert result.exit_code == 1
    assert "pip install 'spanwise[server]'" in result.stderr


SLEEPER = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture
def children(monkeypatch):
    """The processes that `follow` starts; ended after the test."""
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(detached.subprocess, "Popen", Recorded)
    yield started
    for process in started:
        process.kill()
        process.wait()


FAILING = """
import sys
from cluster.cli.foreground import serve_here
from cluster.config import ServeConfig
from cluster.errors import ConfigurationError

def run(config, **_):
    raise ConfigurationError("the model has no tokenizer")

serve_here(ServeConfig(model="m", port=int(sys.argv[1]), log_dir=sys.argv[2]), run)
"""


def test_detached_server_is_left_running_once_ready(config, children, capfd):
    """The fake server stands for the child's: readiness is what DescribeCluster tells on the port."""
    with FakeGenerationServer(status=loading()) as server:
        there = replace(config, port=int(server.address.rpartition(":")[2]))
        polls = []

        def sleep(_):
            polls.append(1)
            server.status = ready_status()

        assert detached.follow(there, SLEEPER, sleep=sleep) == 0
    assert children[0].poll() is None
    assert os.getsid(children[0].pid) == children[0].pid
    assert polls == [1]
    assert "ready at" in capfd.readouterr().out


def test_detached_server_that_fails_tells_why(config, capfd):
    command = [sys.executable, "-c", FAILING, str(config.port), config.log_dir]
    assert detached.follow(config, command, sleep=lambda _: None) != 0
    assert "the model has no tokenizer" in capfd.readouterr().err


def test_detached_server_that_dies_without_a_record_shows_its_last_words(config, capfd):
    command = [sys.executable, "-c", "print('killed by the moon'); raise SystemExit(7)"]
    assert detached.follow(config, command, sleep=lambda _: None) == 7
    errors = capfd.readouterr().err
    assert "status 7" in errors
    assert "killed by the moon" in errors


def test_interrupt_while_waiting_ends_the_child(config, children):
    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        detached.follow(config, SLEEPER, sleep=interrupt)
    assert children[0].poll() is not None

"""The command with Ray: three worker processes on this machine, from start to every way of ending."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.client import Client
from cluster.errors import StageUnavailableError
from cluster.hub.resolve import resolve
from cluster.model_spec import FolderSource
from tests.integration.serve_command import COMMAND, END_SECONDS, Running, Server, environment, holds_within, running
from tests.worker.references import generate, load_reference

PROMPT = "My fellow Americans, tonight"
NUM_BLOCKS = 6  # of bloom-tiny
LOSS_SECONDS = 5.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(420),
    pytest.mark.skipif(sys.platform != "linux", reason="knows processes by /proc"),
]


@pytest.fixture(scope="module")
def state_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve") / "state"


@pytest.fixture(scope="module")
def server(state_home: Path) -> Iterator[Server]:
    """One server in the background, for every test that leaves it as it is; the last one stops it."""
    server = Server(["bloom-tiny", "--workers", "3", "--detach"], environment(state_home))
    with running(server):
        process = int(server.wait_for(re.compile(r"process (\d+), logs in"))[1])
        server.sessions.add(process)
        server.wait_ready()
        assert server.wait(END_SECONDS) == 0
        yield server


def test_text_is_that_of_transformers(server: Server) -> None:
    from transformers import AutoTokenizer

    source = resolve("bloom-tiny").source
    assert isinstance(source, FolderSource)
    tokenizer = AutoTokenizer.from_pretrained(source.path)
    token_ids = generate(load_reference(Path(source.path)), tokenizer(PROMPT).input_ids, 40).token_ids
    assert server.generate(PROMPT, 40) == tokenizer.decode(token_ids) + "\n"


def test_status_shows_three_processes_whose_spans_tile_the_model(server: Server) -> None:
    status = server.status()
    assert status["state"] == "ready"
    spans = [(stage["numerics"]["first_block"], stage["numerics"]["end_block"]) for stage in status["stages"]]
    assert [start for start, _ in spans] == [0, *(end for _, end in spans[:-1])]
    assert spans[-1][1] == NUM_BLOCKS
    workers = {stage["process_id"] for stage in status["stages"]}
    assert len(workers) == 3
    assert workers < server.processes()


def test_second_server_on_the_port_is_refused_at_once(server: Server) -> None:
    again = server.call("serve", "bloom-tiny", "--port", server.port)
    assert again.returncode == 1
    assert f"bloom-tiny is already served on port {server.port}" in again.stderr
    elsewhere = {**server.environment, "XDG_STATE_HOME": f"{server.environment['XDG_STATE_HOME']}-other"}
    stranger = Running([*COMMAND, "serve", "bloom-tiny", "--port", server.port], elsewhere)
    with running(stranger):
        assert stranger.wait(END_SECONDS * 3) == 1
    assert f"cannot listen on {server.address} (Address already in use)" in stranger.output


def test_stop_leaves_no_process(server: Server) -> None:
    stopped = server.call("stop", "--port", server.port)
    assert (stopped.returncode, stopped.stdout) == (0, f"stopped bloom-tiny on port {server.port}\n")
    assert server.are_all_gone(1.0), server.processes()
    after = server.call("status", "--server", server.address)
    assert after.returncode == 1
    assert f"the server of bloom-tiny at {server.address} was stopped" in after.stderr
    logs = Path(server.environment["XDG_STATE_HOME"], "spanwise", "logs", server.port)
    assert "ERROR" not in (logs / "coordinator.log").read_text()
    assert (logs / "console.log").read_text().endswith("shutting down\n")


def test_lost_worker_ends_streams_and_the_command_and_is_told(state_home: Path) -> None:
    server = Server(["bloom-tiny", "--workers", "3"], environment(state_home))
    with running(server):
        server.wait_ready()
        worker = server.status()["stages"][1]["process_id"]
        client = Client(server.address, silence_timeout=LOSS_SECONDS)  # another error, if nothing is told for so long
        with client, client.generate(PROMPT, max_tokens=1500, ignore_eos=True) as pieces:
            next(pieces)
            os.kill(worker, signal.SIGKILL)
            with pytest.raises(StageUnavailableError, match="stage"):
                list(pieces)
            assert holds_within(LOSS_SECONDS, lambda: client.describe().state == "failed")
            farewell = client.describe()
        assert [stage.stage for stage in farewell.stages if stage.state == "lost"] == [1]
        assert "stage 1" in farewell.message
        assert server.wait(END_SECONDS) == 1
        assert server.are_all_gone(1.0), server.processes()
    assert "raylet" not in server.output
    after = server.call("status", "--server", server.address)
    assert after.returncode == 1
    assert "failed: stage 1 " in after.stderr


def test_interrupt_while_starting_leaves_nothing(state_home: Path) -> None:
    server = Server(["bloom-tiny", "--workers", "3"], environment(state_home))
    with running(server):
        server.wait_for(re.compile("starting a local Ray cluster"))
        os.kill(server.process.pid, signal.SIGINT)
        assert server.wait(60.0) == 130
        assert server.are_all_gone(1.0), server.processes()
    assert "Traceback" not in server.output

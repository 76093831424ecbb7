"""The command with Ray, a model from a hub, and mutual TLS between processes: who fetches what, who may call whom."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.hub.resolve import resolve
from cluster.testing.hub import HubRequest, LocalHub
from tests.checkpoints import BOS_ID, make_checkpoint
from tests.integration.serve_command import END_SECONDS, Server, environment, holds_within, running
from tests.worker.references import generate, load_reference

REPO = "owner/model"
NUM_BLOCKS = 6
PROMPT = "Call me Ishmael."
MAX_TOKENS = 24

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(420),
    pytest.mark.skipif(sys.platform != "linux", reason="knows processes by /proc"),
]


class WatchedHub(LocalHub):
    """A hub that knows which process of this machine asks for a file, from the connection's other end."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.askers: dict[HubRequest, int | None] = {}

    def find(self, repo_id: str, revision: str, file: str, token: str) -> Path:
        """Called while the request's connection is open, so its owner can be told."""
        owners = {end.laddr.port: end.pid for end in psutil.net_connections("tcp") if end.laddr}
        for request in list(self.requests):
            self.askers.setdefault(request, owners.get(request.client_port))
        return super().find(repo_id, revision, file, token)

    def weights_fetched_by(self, process_id: int) -> set[str]:
        asked = {request.path for request, asker in self.askers.items() if asker == process_id}
        return {path.rpartition("/")[2] for path in asked if path.endswith(".safetensors")}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WatchedHub]:
    root = tmp_path_factory.mktemp("hub")
    make_checkpoint(root / REPO, "llama", {"num_hidden_layers": NUM_BLOCKS}, num_shards=8)
    with WatchedHub(root) as hub:
        yield hub


@pytest.fixture(scope="module")
def server(hub: WatchedHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for every test that leaves it as it is; the last one kills it."""
    state_home = tmp_path_factory.mktemp("serve") / "state"
    variables = environment(state_home, HF_ENDPOINT=hub.url, HF_HUB_DISABLE_IMPLICIT_TOKEN="1")
    server = Server([REPO, "--workers", "3", "--internal-tls", "on"], variables)
    with running(server):
        server.wait_ready()
        yield server


@pytest.fixture(scope="module")
def stages(server: Server) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.status()["stages"]
    return found


def test_text_is_that_of_transformers(server: Server, hub: WatchedHub) -> None:
    reference = load_reference(hub.root / REPO)
    token_ids = generate(reference, list(PROMPT.encode()), MAX_TOKENS).token_ids
    text = bytes(token_id for token_id in token_ids if token_id < BOS_ID).decode(errors="replace")
    assert server.generate(PROMPT, MAX_TOKENS, "--ignore-eos") == text + "\n"


def test_each_worker_process_fetches_shards_of_its_span_and_no_others(
    hub: WatchedHub, stages: list[dict[str, Any]]
) -> None:
    """The three share a cache, as any processes of one machine: a shard of two spans is fetched by one of them."""
    weight_map = resolve(str(hub.root / REPO)).weight_map
    fetched = [hub.weights_fetched_by(stage["process_id"]) for stage in stages]
    for stage, files in zip(stages, fetched, strict=True):
        numerics = stage["numerics"]
        names = [f"model.layers.{block}." for block in range(numerics["first_block"], numerics["end_block"])]
        names += ["model.embed_tokens."] if stage["stage"] == 0 else []
        names += ["model.norm.", "lm_head."] if stage["stage"] == len(stages) - 1 else []
        assert files <= {file for tensor, file in weight_map.items() if tensor.startswith(tuple(names))}
    assert set[str]().union(*fetched) == set(weight_map.values())
    assert all(files < set(weight_map.values()) for files in fetched)


def test_workers_answer_only_who_has_the_clusters_certificate(stages: list[dict[str, Any]]) -> None:
    for stage in stages:
        with grpc.insecure_channel(stage["address"], (("grpc.enable_http_proxy", 0),)) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            with pytest.raises(grpc.RpcError) as refused:
                health.Check(health_pb2.HealthCheckRequest(), timeout=END_SECONDS)
            assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


def test_nothing_of_ours_outlives_a_killed_command(server: Server) -> None:
    """Two agents of Ray's own stay a minute longer: they report the raylet's death to a store that died with it."""
    agents = {pid for pid in server.processes() if psutil.Process(pid).cmdline()[0].endswith("Agent")}
    assert len(agents) == 2
    os.kill(server.process.pid, signal.SIGKILL)
    assert holds_within(END_SECONDS, lambda: server.processes() <= agents), server.processes()
    after = server.call("status", "--server", server.address)
    assert f"the server of {REPO} at {server.address} died without a word" in after.stderr

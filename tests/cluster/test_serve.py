"""What `cluster serve` decides before any process is started."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster import serve
from cluster.config import ServeConfig
from cluster.errors import ConfigurationError, IncompatibleVersionError, NotFoundError
from cluster.placement import NodeFacts
from tests.quantized_checkpoints import make_quantized


@pytest.fixture
def listener() -> Iterator[tuple[str, int]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """Ray that notes how it would be started and then fails, on a machine without a cluster."""
    calls: list[dict[str, Any]] = []

    def init(**options: Any) -> None:
        calls.append(options)
        raise ConnectionError("no such luck")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return calls


def run(**settings: Any) -> tuple[str, list[str]]:
    """Return the error and the remarks of a run that must fail."""
    notes: list[str] = []
    config = ServeConfig(model="bloom-tiny", port=0, **settings)
    with pytest.raises(ConfigurationError) as failed:
        serve.run(config, on_status=lambda _: None, on_note=notes.append, stop=threading.Event())
    return str(failed.value), notes


def test_port_in_use_is_told_with_the_way_out(listener: tuple[str, int]) -> None:
    host, port = listener
    with pytest.raises(ConfigurationError, match=rf"cannot listen on {host}:{port} .*`cluster stop`.*--port"):
        serve.check_port(host, port)


def test_address_of_another_machine_cannot_be_listened_on() -> None:
    with pytest.raises(ConfigurationError, match=r"cannot listen on 203\.0\.113\.1:0"):
        serve.check_port("203.0.113.1", 0)


def test_free_ports_are_free_in_both_families() -> None:
    serve.check_port("127.0.0.1", 0)
    serve.check_port("::1", 0)


def test_unknown_model_is_told_before_ray_starts(no_ray: list[dict[str, Any]], tmp_path: Path) -> None:
    config = ServeConfig(model=str(tmp_path / "nowhere"), port=0)
    with pytest.raises((NotFoundError, ConfigurationError), match="nowhere"):
        serve.run(config, on_status=lambda _: None, on_note=lambda _: None, stop=threading.Event())
    assert no_ray == []


def test_more_workers_than_blocks_are_refused_before_ray_starts(no_ray: list[dict[str, Any]]) -> None:
    error, _ = run(workers=7)
    assert error.startswith("7 workers cannot share the 6 blocks of bloom-tiny")
    assert no_ray == []


def test_a_precision_that_the_checkpoint_does_not_come_in_is_refused_before_ray_starts(
    no_ray: list[dict[str, Any]], tmp_path: Path
) -> None:
    make_quantized(tmp_path, "nf4")
    config = ServeConfig(model=str(tmp_path), precision="bf16", port=0)
    with pytest.raises(ConfigurationError, match="comes in nf4 and cannot be served in bf16"):
        serve.run(config, on_status=lambda _: None, on_note=lambda _: None, stop=threading.Event())
    assert no_ray == []


def test_a_context_that_the_model_does_not_have_is_refused_before_ray_starts(no_ray: list[dict[str, Any]]) -> None:
    error, _ = run(max_context=1 << 20)
    assert error.startswith("--max-context 1048576 is more than bloom-tiny allows")
    assert no_ray == []


def test_without_an_address_a_small_cluster_is_started_here(no_ray: list[dict[str, Any]]) -> None:
    error, notes = run(workers=6)
    assert error == "Ray did not start: no such luck"
    assert notes == ["starting a local Ray cluster on this machine"]
    assert no_ray[0]["address"] == "local"
    assert no_ray[0]["num_cpus"] >= 6  # a slot for every worker, however few cores there are


def test_cluster_that_ray_left_on_this_machine_is_joined(
    no_ray: list[dict[str, Any]], listener: tuple[str, int], tmp_path: Path
) -> None:
    record = tmp_path / "ray" / "ray_current_cluster"
    record.parent.mkdir()
    record.write_text(f"{listener[0]}:{listener[1]}")
    _, notes = run()
    assert notes == [f"joining the Ray cluster at {listener[0]}:{listener[1]}"]
    run(address="local")
    assert [call["address"] for call in no_ray] == [record.read_text(), "local"]
    record.write_text("127.0.0.1:1")  # nobody listens there any more
    run()
    assert no_ray[-1]["address"] == "local"


def test_silent_address_is_told_before_ray_waits_for_it(
    no_ray: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    error, _ = run(address="127.0.0.1:1")
    assert error.startswith("no Ray cluster answers at 127.0.0.1:1; start one there with `ray start --head`")
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    assert run()[0].startswith("no Ray cluster answers at nonsense;")
    assert no_ray == []


def test_ray_client_address_is_refused_with_the_way_that_works(no_ray: list[dict[str, Any]]) -> None:
    error, _ = run(address="ray://head:10001")
    assert "run `cluster serve` on a node of the cluster" in error
    assert no_ray == []


def test_cluster_that_refuses_us_is_told_with_the_token_it_may_want(
    no_ray: list[dict[str, Any]], listener: tuple[str, int]
) -> None:
    address = f"{listener[0]}:{listener[1]}"
    error, _ = run(address=address)
    assert error.startswith(f"the Ray cluster at {address} did not let us join: no such luck; if it asks for a token")
    assert no_ray[0]["address"] == address


def test_nodes_of_one_version_are_accepted_and_others_are_listed() -> None:
    nodes = [NodeFacts(str(number), f"n{number}", "192.0.2.1", "0.1.0") for number in range(2)]
    serve.check_same_version(nodes)
    with pytest.raises(IncompatibleVersionError, match=r"n0: 0\.1\.0, n1: 0\.1\.0, n9: 0\.2\.0"):
        serve.check_same_version([*nodes, NodeFacts("9", "n9", "192.0.2.9", "0.2.0")])


RAY_ON_A_NODE_WITHOUT_SPANWISE = """The actor died because of an error raised in its creation task, ray::WorkerActor() \
(pid=233, ip=192.0.2.3, actor_id=01f6, repr=<worker.actor>)
RuntimeError: The actor with name WorkerActor failed to import on the worker. This may be because of this:

ModuleNotFoundError: No module named 'worker'
"""


def test_a_node_without_spanwise_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"NodeManagerAddress": "192.0.2.3", "NodeManagerHostname": "n3"}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    told = serve.explain(ray.exceptions.RayError(RAY_ON_A_NODE_WITHOUT_SPANWISE))
    assert told.startswith("on n3 (192.0.2.3): ModuleNotFoundError: No module named 'worker'; install the same version")

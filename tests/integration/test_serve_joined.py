"""The command on a Ray cluster that others started: it takes what is there, and leaves it as it was."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.serve_command import END_SECONDS, Running, Server, environment, holds_within, running

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(420),
    pytest.mark.skipif(sys.platform != "linux", reason="knows processes by /proc"),
]


@pytest.fixture(scope="module")
def variables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return environment(tmp_path_factory.mktemp("joined") / "state", RAY_USAGE_STATS_ENABLED="0")


@pytest.fixture(scope="module")
def ray_cluster(variables: dict[str, str]) -> Iterator[tuple[Running, str]]:
    """A head with two cores, and its address."""
    ray = str(Path(sys.executable).with_name("ray"))
    options = ["--port=0", "--num-cpus=2", "--object-store-memory=80000000", "--include-dashboard=false"]
    cluster = Running([ray, "start", "--head", "--block", "--disable-usage-stats", *options], variables)
    with running(cluster):
        yield cluster, cluster.wait_for(re.compile(r"--address='([^']+)'"))[1]


def test_more_workers_than_cores_are_refused_with_both_numbers(
    ray_cluster: tuple[Running, str], variables: dict[str, str]
) -> None:
    command = Server(["bloom-tiny", "--workers", "3", "--address", ray_cluster[1]], variables)
    with running(command):
        assert command.wait(60.0) == 1
    assert "3 workers need 3 CPU and the Ray cluster has 2: add nodes, or ask for fewer" in command.output


def test_killed_command_leaves_the_cluster_and_none_of_its_actors(
    ray_cluster: tuple[Running, str], variables: dict[str, str]
) -> None:
    cluster, address = ray_cluster
    server = Server(["bloom-tiny", "--address", address], variables)
    with running(server):
        server.wait_ready()
        worker = server.status()["stages"][0]["process_id"]
        assert worker in cluster.processes()
        os.kill(server.process.pid, signal.SIGKILL)
        assert holds_within(END_SECONDS, lambda: worker not in cluster.processes())
    assert cluster.process.poll() is None

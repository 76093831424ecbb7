"""`cluster serve --detach`: the same command as a session of its own, followed until it is ready."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import grpc

from cluster.cli.console import print_error, stdout
from cluster.cli.display import ClusterDisplay
from cluster.cli.foreground import client_address, how_to_use, load_server
from cluster.cli.local_runs import run_store
from cluster.cli.settings import to_arguments, without_settings
from cluster.config import ServeConfig
from cluster.rpc.v1 import generation_service_pb2 as service
from cluster.rpc.v1 import generation_service_pb2_grpc as service_grpc

POLL_SECONDS = 0.5
END_SECONDS = 15.0


def start_detached(config: ServeConfig) -> int:
    """Start the server, show its progress, return 0 once it is ready or its exit status when it ends before.

    Ctrl-C while waiting ends the server too.
    """
    load_server()
    arguments = to_arguments(replace(config, detach=False))
    return follow(config, [sys.executable, "-m", "cluster.cli", "serve", *arguments], sleep=time.sleep)


def follow(config: ServeConfig, command: Sequence[str], *, sleep: Callable[[float], None]) -> int:
    """Run a serving command in the background until it is ready."""
    log = Path(config.log_dir) / "console.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=without_settings(os.environ),
        )
    try:
        return _wait_until_ready(config, child, log, sleep)
    except BaseException:
        child.terminate()
        child.wait(END_SECONDS)
        raise


def _wait_until_ready(
    config: ServeConfig, child: subprocess.Popen[bytes], log: Path, sleep: Callable[[float], None]
) -> int:
    address = client_address(config)
    with ClusterDisplay(stdout()) as display, grpc.insecure_channel(address) as channel:
        stub = service_grpc.GenerationServiceStub(channel)
        while (status := child.poll()) is None:
            cluster = _describe(stub)
            if cluster is not None:
                display.show(cluster)
                if cluster.state == service.CLUSTER_STATE_READY:
                    display.note(f"process {child.pid}, logs in {log.parent}")
                    display.note(how_to_use(config))
                    return 0
            sleep(POLL_SECONDS)
    print_error(_why_it_ended(config, status, log))
    return status or 1


def _describe(stub: service_grpc.GenerationServiceStub) -> service.DescribeClusterResponse | None:
    try:
        answer: service.DescribeClusterResponse = stub.DescribeCluster(service.DescribeClusterRequest(), timeout=5.0)
    except grpc.RpcError:
        return None  # not listening yet; the child's end is what tells a failure
    return answer


def _why_it_ended(config: ServeConfig, status: int, log: Path) -> str:
    record = run_store().read(config.port)
    if record is not None and record.state == "failed":
        return record.message
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-10:])
    return f"the server ended with status {status} before it was ready; its last words in {log}:\n{tail}"

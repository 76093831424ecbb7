"""Serving in this process: the run record, the log file and the display around `cluster.serve.run`."""

from __future__ import annotations

import importlib
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.cli.console import stdout
from cluster.cli.display import ClusterDisplay
from cluster.cli.local_runs import run_store
from cluster.config import ServeConfig
from cluster.errors import ConfigurationError, SpanwiseError
from cluster.logs import configure_logging
from cluster.ray_environment import ray_environment
from cluster.runs import RunRecord, RunState, RunStore, process_started, state_directory

if TYPE_CHECKING:
    from cluster.rpc.v1 import generation_service_pb2 as service

Run = Callable[..., int]
"""`cluster.serve.run`, or what a test puts in its place."""


def serve_here(config: ServeConfig, run: Run | None = None) -> int:
    """Serve until Ctrl-C or until a stage is lost; return the exit status. The record says how it ended."""
    run = run or load_server().run
    configure_logging(config.log_dir, "serve", json=config.log_json)
    keeper = RecordKeeper(run_store(), config)
    with keeper, ClusterDisplay(stdout()) as display:

        def on_status(cluster: service.DescribeClusterResponse) -> None:
            display.show(cluster)
            if keeper.note_state(cluster):
                display.note(how_to_use(config))

        keeper.exit_status = run(config, on_status=on_status, on_note=display.note, stop=threading.Event())
    return keeper.exit_status


def with_place(config: ServeConfig) -> ServeConfig:
    """Return the settings with a port and a log directory, both needed to find the run again.

    Raises ConfigurationError when a server of ours already runs on the port.
    """
    port = config.port or _free_port(config.host)
    other = run_store().read(port)
    if other is not None and other.is_alive and other.pid != os.getpid():
        raise ConfigurationError(
            f"{other.model} is already served on port {port} by process {other.pid}: stop it with `cluster stop --port "
            f"{port}`, or choose another port with --port"
        )
    folder = Path(config.log_dir) if config.log_dir else state_directory(os.environ) / "logs" / str(port)
    return replace(config, port=port, log_dir=str(folder.absolute()))


def client_address(config: ServeConfig) -> str:
    """Return the address by which a client on this machine reaches the server."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    return f"[{host}]:{config.port}" if ":" in host else f"{host}:{config.port}"


def how_to_use(config: ServeConfig) -> str:
    """Return what to do with a server that is ready."""
    address = client_address(config)
    server = "" if address == "127.0.0.1:7050" else f" --server {address}"
    return f'ready at {address}; try: cluster generate "Once upon a time"{server}   (`cluster stop` or Ctrl-C ends it)'


def load_server() -> Any:
    """Import `cluster.serve`; a client-only installation is told what is missing."""
    os.environ.update(ray_environment(os.environ, Path.home()))
    try:
        return importlib.import_module("cluster.serve")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("cluster", "coordinator", "worker"):
            raise
        raise ConfigurationError(
            f"serving needs more than the client ({error.name} is not installed): pip install 'spanwise[server]'"
        ) from error


class RecordKeeper:
    """Keeps the run record true from start to end, however it ends."""

    def __init__(self, store: RunStore, config: ServeConfig) -> None:
        self.exit_status = 1
        self._store = store
        self._record = RunRecord(
            pid=os.getpid(),
            process_started=process_started(os.getpid()),
            address=client_address(config),
            model=config.model,
            log_dir=config.log_dir,
        )

    def __enter__(self) -> RecordKeeper:
        self._store.write(self._record)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, SpanwiseError):
            self._change("failed", error.message)
        elif error is not None and not isinstance(error, KeyboardInterrupt):
            self._change("failed", f"{type(error).__name__}: {error}")
        elif error is not None or self.exit_status in (0, 130):
            self._change("stopped")
        else:
            self._change("failed", self._record.message or f"ended with status {self.exit_status}")

    def note_state(self, cluster: service.DescribeClusterResponse) -> bool:
        """Take down what the cluster tells; True when it has just become ready."""
        from cluster.client.values import read_cluster

        state = read_cluster(cluster).state
        was_ready = self._record.state == "ready"
        workers = tuple(stage.worker_id for stage in cluster.stages)
        if state == "failed":
            self._change("failed", cluster.message, workers)
        elif state == "draining":
            self._drain()
        else:
            self._change("ready" if state == "ready" or was_ready else "starting", workers=workers)
        return state == "ready" and not was_ready

    def _drain(self) -> None:
        """Note that the server no longer answers; why it failed is kept."""
        if self._record.state != "failed":
            self._change("draining")

    def _change(self, state: RunState, message: str = "", workers: tuple[str, ...] | None = None) -> None:
        worker_ids = self._record.worker_ids if workers is None else workers
        changed = replace(self._record, state=state, message=message, worker_ids=worker_ids)
        if changed != self._record:
            self._record = changed
            self._store.write(changed)


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            raise ConfigurationError(f"cannot listen on {host}: {error.strerror}; correct --host") from error
        return int(probe.getsockname()[1])

"""`cluster stop`: ends the server of this machine, if the recorded process is still the one that was started."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import typer

from cluster.cli.parameters import Port

if TYPE_CHECKING:
    from cluster.runs import RunRecord

PATIENCE_SECONDS = 15.0


def stop(port: Port = None) -> None:
    """Stop the server that `cluster serve` started on this machine; requests under way end.

    Examples:

    - `cluster stop`
    - `cluster stop --port 7051`
    """
    from cluster.cli.local_runs import find_run
    from cluster.errors import StageTimeoutError

    record = find_run(port)
    if not record.is_alive:
        typer.echo(f"nothing to stop: the server of {record.model} on port {record.port} no longer runs")
        return
    os.kill(record.pid, signal.SIGTERM)
    if not wait_until_gone(record, now=time.monotonic, sleep=time.sleep):
        raise StageTimeoutError(
            f"process {record.pid} still runs {PATIENCE_SECONDS:g} s after SIGTERM; see `cluster logs --port "
            f"{record.port}`, or end it with `kill -9 {record.pid}`"
        )
    typer.echo(f"stopped {record.model} on port {record.port}")


def wait_until_gone(record: RunRecord, *, now: Callable[[], float], sleep: Callable[[float], None]) -> bool:
    """Wait for a process to end; False when it still runs after PATIENCE_SECONDS."""
    deadline = now() + PATIENCE_SECONDS
    while record.is_alive:
        if now() >= deadline:
            return False
        sleep(0.1)
    return True

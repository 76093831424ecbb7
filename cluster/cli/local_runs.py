"""Finding the `cluster serve` of this machine through its run record. Covers choosing one and telling
its fate."""

from __future__ import annotations

import os

from cluster.config import DEFAULT_PORT
from cluster.errors import NotFoundError, StageUnavailableError
from cluster.runs import RunRecord, RunState, RunStore, state_directory


def run_store() -> RunStore:
    """Return the run records of this user."""
    return RunStore(state_directory(os.environ))


def find_run(port: int | None) -> RunRecord:
    """Return the run on a port; without one the only run alive, else the last on the default port.

    Raises NotFoundError when there is none, or when several are alive and no port says which.
    """
    store = run_store()
    if port is None:
        alive = [record for record in store.all() if record.is_alive]
        if len(alive) > 1:
            ports = ", ".join(str(record.port) for record in alive)
            raise NotFoundError(f"several servers run on this machine (ports {ports}): say which one with --port")
        if alive:
            return alive[0]
    wanted = DEFAULT_PORT if port is None else port
    record = store.read(wanted)
    if record is None:
        raise NotFoundError(f"no `cluster serve` of yours was started on port {wanted} of this machine")
    return record


_SILENCES: dict[RunState, str] = {
    "starting": "is starting and does not answer yet",
    "ready": "was ready and does not answer now",
    "draining": "is shutting down",
    "stopped": "is shutting down",
}
"""What it means that the server of a living process does not answer."""


def explain_absence(server: str, error: StageUnavailableError) -> StageUnavailableError:
    """Return why no server answers: what the run record of that port tells, if it is on this machine."""
    host, _, port = server.rpartition(":")
    is_local = host in ("127.0.0.1", "localhost", "[::1]") and port.isdigit()
    record = run_store().read(int(port)) if is_local else None
    if record is None:
        return error
    logs = f"`cluster logs --port {port}` shows more"
    if record.state == "failed":
        return StageUnavailableError(f"the server of {record.model} at {server} failed: {record.message}; {logs}")
    if record.is_alive:
        return StageUnavailableError(f"{record.model} at {server} {_SILENCES[record.state]}; {logs}")
    if record.state == "stopped":
        return StageUnavailableError(f"the server of {record.model} at {server} was stopped")
    return StageUnavailableError(f"the server of {record.model} at {server} died without a word; {logs}")

"""Run records: what `cluster serve` leaves in the state directory, so that other commands find it.

One JSON file per client-facing port, replaced atomically. A record outlives its process: it then tells how the run
ended. Covers whether the recorded process is still the one that wrote it.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from cluster.errors import ConfigurationError

RunState = Literal["starting", "ready", "draining", "stopped", "failed"]


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One `cluster serve`. `process_started` tells it from a later process with the same number."""

    pid: int
    process_started: str
    address: str  # host:port that clients on this machine dial
    model: str
    log_dir: str
    state: RunState = "starting"
    message: str = ""  # why it failed
    worker_ids: tuple[str, ...] = ()  # by stage, once known; a worker's log is named after it

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    @property
    def is_alive(self) -> bool:
        """Whether the process that wrote the record still runs."""
        return process_started(self.pid) == self.process_started != ""


def state_directory(environment: Mapping[str, str]) -> Path:
    """Return where Spanwise keeps run records and logs: $XDG_STATE_HOME/spanwise, else ~/.local/state/spanwise."""
    home = environment.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "spanwise"


class RunStore:
    """The records of one state directory."""

    def __init__(self, directory: Path) -> None:
        self._runs = directory / "runs"

    def write(self, record: RunRecord) -> None:
        """Replace the record of its port, atomically."""
        try:
            self._runs.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._runs, suffix=".part", delete=False) as file:
                json.dump(asdict(record), file, indent=1)
            os.replace(file.name, self._path(record.port))
        except OSError as error:
            raise ConfigurationError(
                f"cannot write the run record in {self._runs} ({error.strerror}): make it writable, or set "
                "XDG_STATE_HOME to a folder that is"
            ) from error

    def read(self, port: int) -> RunRecord | None:
        """Return the last run on a port, dead or alive; None when there is none or its file is damaged."""
        try:
            values = json.loads(self._path(port).read_text())
            return RunRecord(**values | {"worker_ids": tuple(values["worker_ids"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def all(self) -> Iterator[RunRecord]:
        """Return the last run of every port, by port."""
        ports = sorted(int(path.stem) for path in self._runs.glob("*.json") if path.stem.isdigit())
        return (record for port in ports if (record := self.read(port)) is not None)

    def _path(self, port: int) -> Path:
        return self._runs / f"{port}.json"


def process_started(pid: int) -> str:
    """Return when a process started, as the system writes it; empty when there is none (or only its corpse).

    Two processes that got the same number differ in it.
    """
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            return ""
        return "" if fields[0] in "ZX" else fields[19]
    listing = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    state, _, started = listing.stdout.strip().partition(" ")
    return "" if state.startswith("Z") else started.strip()

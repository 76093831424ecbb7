"""`cluster serve` as a person runs it: a process of its own session, with everything that it starts.

Processes are known by their session: Ray puts all of its own, workers and actors included, in its starter's. Ending a
test ends what is left of them, by number.
"""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.runs import process_started

COMMAND = [sys.executable, "-m", "cluster.cli"]
START_SECONDS = 240.0
END_SECONDS = 10.0
CALL_SECONDS = 60.0
READY = re.compile(r"ready at (\S+:\d+)")


def environment(state_home: Path, **changes: str) -> dict[str, str]:
    """Return this process's environment without what would lead the command to another cluster, hub or account."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SPANWISE_", "RAY_", "HF_"))}
    isolation = {
        "XDG_STATE_HOME": str(state_home),
        "HF_HOME": str(state_home / "hf"),
        "RAY_TMPDIR": str(state_home.parent),  # no cluster of this machine is found there
        "NO_PROXY": "127.0.0.1",
    }
    return kept | isolation | changes


class Running:
    """A command that keeps running, its output line by line."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self.environment = environment
        self.output = ""
        self.process = subprocess.Popen(
            arguments,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.sessions = {self.process.pid}
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def wait_for(self, pattern: re.Pattern[str], seconds: float = START_SECONDS) -> re.Match[str]:
        """Return the first match in a line of output from now on; fail when the output ends or time is up."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no {pattern.pattern!r} within {seconds:g} s in:\n{self.output}") from None
            if match := pattern.search(line):
                return match
            assert line, f"ended without {pattern.pattern!r}:\n{self.output}"

    def wait(self, seconds: float) -> int:
        """Return the exit status."""
        return self.process.wait(seconds)

    def processes(self) -> set[int]:
        """Return what lives of it: itself and all that it started."""
        return {pid for pid in _all_pids() if _session(pid) in self.sessions and process_started(pid)}

    def are_all_gone(self, seconds: float = END_SECONDS) -> bool:
        return holds_within(seconds, lambda: not self.processes())

    def kill_all(self) -> None:
        """End what is left, by number; the command first, so that it starts nothing more."""
        for pid in sorted(self.processes()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(END_SECONDS)
        self._reader.join(END_SECONDS)

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.output += line
                self._lines.put(line)
        self._lines.put("")


class Server(Running):
    """A `cluster serve` that is ready, and the other commands for it."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        super().__init__([*COMMAND, "serve", *arguments, "--port", "0"], environment)
        self.address = ""

    def wait_ready(self) -> None:
        self.address = self.wait_for(READY)[1]

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run another `cluster` command to its end."""
        return subprocess.run(
            [*COMMAND, *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=CALL_SECONDS,
            check=False,
        )

    def status(self) -> dict[str, Any]:
        done = self.call("status", "--server", self.address, "--json")
        assert done.stdout, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def generate(self, prompt: str, max_tokens: int, *more: str) -> str:
        """Return the greedy text that the command prints."""
        options = ("--max-tokens", str(max_tokens), "--temperature", "0", *more)
        done = self.call("generate", prompt, "--server", self.address, *options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def port(self) -> str:
        return self.address.rpartition(":")[2]


@contextmanager
def running(command: Running) -> Iterator[None]:
    """Leave nothing of a command behind, whatever a test found."""
    try:
        yield
    finally:
        command.kill_all()


def holds_within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Ask until the answer is yes; False when time is up."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None

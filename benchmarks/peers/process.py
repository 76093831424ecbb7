"""The protocol between a benchmark and a system in a process of its own, both ends.

The process prints one line of JSON about itself when it is ready, or why it refuses to load, then answers every line
with a workload with a line with a round. Whatever else it prints goes to stderr, and it ends when its input does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from measures import Round, Workload

Run = Callable[[Workload], Round]


class PeerError(RuntimeError):
    """A process ended instead of answering; a sentence says why."""


class Peer:
    """A process, from the outside. `about` is what it said of itself: version, license, what matters to readers."""

    def __init__(self, command: Sequence[str], variables: Mapping[str, str] | None = None) -> None:
        self.command = command
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables
        )
        try:
            self.about = self._read()
        except BaseException:
            self.close()
            raise

    @property
    def process_id(self) -> int:
        return self._process.pid

    def run(self, workload: Workload) -> Round:
        """Run one workload. Raises PeerError when the process ends instead."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(workload)) + "\n")
        self._process.stdin.flush()
        return Round(**self._read())

    def close(self) -> None:
        """End the process. Idempotent."""
        with contextlib.suppress(BrokenPipeError, ValueError, subprocess.TimeoutExpired):
            self._process.communicate(timeout=30)
        self._process.kill()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(f"`{' '.join(self.command)}` ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "refusal" in answer:
            raise PeerError(answer["refusal"])
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self._process.kill()
        self.close()


@contextlib.contextmanager
def own_output() -> Iterator[Any]:
    """Yield the standard output for the protocol alone; what libraries print meanwhile goes to stderr."""
    with os.fdopen(os.dup(1), "w", buffering=1) as output:
        os.dup2(2, 1)
        yield output


def answer(load: Callable[[], tuple[Mapping[str, Any], Run]], refusals: tuple[type[Exception], ...] = ()) -> None:
    """Be the process: load, say what was loaded, then answer workloads until the input ends.

    Of loading, errors of the kinds `refusals` are told to the benchmark instead of shown with a traceback.
    """
    with own_output() as output:
        try:
            about, run = load()
        except refusals as error:
            print(json.dumps({"refusal": str(error)}), file=output)
            return
        print(json.dumps(about), file=output)
        for line in sys.stdin:
            print(json.dumps(asdict(run(Workload(**json.loads(line))))), file=output)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a process is loaded for."""

    num_threads: int
    max_concurrency: int
    max_context: int


def main(
    description: str | None,
    prepare: Callable[[Path, Path], None],
    load: Callable[[Path, Limits], tuple[Mapping[str, Any], Run]],
) -> None:
    """Be a peer's program: `prepare CHECKPOINT FOLDER` makes its own form of a checkpoint, `run FOLDER` serves it."""
    parser = argparse.ArgumentParser(description=description)
    commands = parser.add_subparsers(required=True, dest="command")
    preparing = commands.add_parser("prepare", help="write the peer's own form of a checkpoint")
    preparing.add_argument("checkpoint", type=Path)
    preparing.add_argument("folder", type=Path)
    running = commands.add_parser("run", help="load that form and answer workloads on standard input")
    running.add_argument("folder", type=Path)
    running.add_argument("--threads", type=int, default=2)
    running.add_argument("--max-concurrency", type=int, default=32)
    running.add_argument("--max-context", type=int, default=512)
    arguments = parser.parse_args()
    if arguments.command == "prepare":
        prepare(arguments.checkpoint, arguments.folder)
    else:
        limits = Limits(arguments.threads, arguments.max_concurrency, arguments.max_context)
        answer(lambda: load(arguments.folder, limits))

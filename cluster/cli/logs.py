"""`cluster logs`: what the processes of a run wrote, in the order of time; optionally as it comes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from cluster.cli.parameters import Json, Port

if TYPE_CHECKING:
    from cluster.logs import LogLine
    from cluster.runs import RunRecord

POLL_SECONDS = 0.3


def logs(
    stage: Annotated[int | None, typer.Option("--stage", help="Only this stage's worker.", min=0)] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new lines until Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", help="How many of the latest lines.", min=0)] = 100,
    port: Port = None,
    json: Json = False,
) -> None:
    """Show the logs of the server on this machine. They hold request ids, never prompts or texts.

    Examples:

    - `cluster logs --follow`
    - `cluster logs --stage 1 --json | jq .message`
    """
    from cluster.cli.console import write
    from cluster.cli.local_runs import find_run

    record = find_run(port)
    tails: dict[Path, Tail] = {}
    with ExitStack() as stack:
        is_first = True
        while is_first or follow:
            for path in log_files(record, stage):
                if path not in tails:
                    tails[path] = stack.enter_context(closing(Tail(path)))
            entries = merge(tails.values())
            for entry in entries[max(0, len(entries) - lines) if is_first else 0 :]:
                write(entry.format(json) + "\n")
            is_first = False
            if follow:
                time.sleep(POLL_SECONDS)


def log_files(record: RunRecord, stage: int | None) -> list[Path]:
    """Return the current file of every process of a run, or of one stage's worker.

    Raises NotFoundError when there is none on this machine.
    """
    from cluster.errors import NotFoundError

    folder = Path(record.log_dir)
    if stage is None:
        found = sorted(folder.glob("*.log"))
    elif stage < len(record.worker_ids):
        found = sorted(folder.glob(f"worker-{record.worker_ids[stage]}.log"))
    else:
        raise NotFoundError(f"{record.model} has {len(record.worker_ids)} stages so far, numbered from 0: no {stage}")
    if not found:
        whose = "" if stage is None else f" of stage {stage}"
        raise NotFoundError(f"there is no log{whose} in {folder} here; a worker on another node has its log there")
    return found


class Entry:
    """A record of a log file: its first line and those that belong to it (a traceback)."""

    def __init__(self, source: str, line: LogLine | None, text: str) -> None:
        self.source = source
        self._line = line
        self._text = text if line is None else line.as_text()
        self._further: list[str] = []

    @property
    def time(self) -> str:
        return self._line.time if self._line else ""

    def add(self, text: str) -> None:
        self._further.append(text)

    def format(self, as_json: bool) -> str:
        """Return it as lines for a person, or as one JSON object."""
        import json
        from dataclasses import asdict

        if not as_json:
            return "\n".join([f"{self.source} | {self._text}", *self._further])
        values = {name: value for name, value in asdict(self._line).items() if value} if self._line else {}
        message = "\n".join([values.get("message", self._text), *self._further])
        return json.dumps({"source": self.source} | values | {"message": message}, ensure_ascii=False)


class Tail:
    """Reads what was added to a log file since the last time, across rotation."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None
        self._inode = 0
        self._rest = ""

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def new_entries(self) -> Iterator[Entry]:
        """Yield what was added, whole lines only."""
        from cluster.logs import read_line

        entry: Entry | None = None
        for text in self._new_lines():
            line = read_line(text)
            if line is None and entry is not None:
                entry.add(text)
                continue
            if entry is not None:
                yield entry
            entry = Entry(self.path.stem, line, text)
        if entry is not None:
            yield entry

    def _new_lines(self) -> list[str]:
        text = self._rest + self._read() + (self._read() if self._reopen_if_rotated() else "")
        *whole, self._rest = text.split("\n")
        return [line for line in whole if line]

    def _read(self) -> str:
        if self._file is None:
            self._reopen_if_rotated()
        return self._file.read() if self._file else ""

    def _reopen_if_rotated(self) -> bool:
        try:
            inode = self.path.stat().st_ino
        except FileNotFoundError:
            return False  # between the two renames of a rotation
        if inode == self._inode:
            return False
        self.close()
        self._file, self._inode = self.path.open(encoding="utf-8", errors="replace"), inode
        return True


def merge(tails: Iterable[Tail]) -> list[Entry]:
    """Return the new entries of all files in the order of time."""
    return sorted((entry for tail in tails for entry in tail.new_entries()), key=attrgetter("time"))

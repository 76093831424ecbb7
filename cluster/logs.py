"""Logging of server processes: one rotated file per process, as lines of text or of JSON.

Records may carry `request_id` and `stage` (through `extra`). Covers set-up and format, and reading a line back.
No prompt or generated text is ever logged: callers pass ids and counts.
"""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path

from cluster.runs import state_directory

MAX_FILE_BYTES = 10 * 1000 * 1000
NUM_OLD_FILES = 5

_EXTRAS = ("request_id", "stage")
_TEXT_LINE = re.compile(r"(?P<time>\S+) (?P<level>[A-Z]+) (?P<logger>\S+)(?: \[(?P<extras>[^\]]*)\])?: (?P<message>.*)")


@dataclass(frozen=True, slots=True)
class LogLine:
    """One record. `time` is ISO 8601 in UTC, so that lines of several processes sort as text."""

    time: str
    level: str
    logger: str
    message: str
    request_id: str = ""
    stage: str = ""

    def as_text(self) -> str:
        extras = " ".join(f"{name}={getattr(self, name)}" for name in _EXTRAS if getattr(self, name))
        return f"{self.time} {self.level} {self.logger}{f' [{extras}]' if extras else ''}: {self.message}"

    def as_json(self) -> str:
        return json.dumps({name: value for name, value in asdict(self).items() if value}, ensure_ascii=False)


def configure_logging(directory: str | Path, name: str, *, json: bool = False, level: str = "INFO") -> Path:
    """Send this process's log records to `<directory>/<name>.log`, created if missing; return the file's path.

    An empty directory means `logs` in the state directory. Replaces what was set up before, so a process that starts
    anew does not write everything twice.
    """
    path = Path(directory or state_directory(os.environ) / "logs") / f"{name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = RotatingFileHandler(path, maxBytes=MAX_FILE_BYTES, backupCount=NUM_OLD_FILES, encoding="utf-8")
    handler.setFormatter(_LineFormatter(is_json=json))
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if isinstance(handler, RotatingFileHandler)]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(level.upper())
    return path


def read_line(line: str) -> LogLine | None:
    """Return the record in a line of either format; None for the further lines of a record (tracebacks)."""
    if line.startswith("{"):
        try:
            return LogLine(**json.loads(line))
        except (ValueError, TypeError):
            return None
    match = _TEXT_LINE.fullmatch(line.rstrip("\n"))
    if match is None:
        return None
    extras = dict(extra.split("=", 1) for extra in (match["extras"] or "").split() if "=" in extra)
    return LogLine(match["time"], match["level"], match["logger"], match["message"], **extras)


class _LineFormatter(logging.Formatter):
    """Formats a record as one LogLine; in text a traceback follows on lines of its own."""

    def __init__(self, *, is_json: bool) -> None:
        super().__init__()
        self._is_json = is_json

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.exc_info:
            message = f"{message}\n{self.formatException(record.exc_info)}"
        line = LogLine(
            time=datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            level=record.levelname,
            logger=record.name,
            message=message,
            **{name: str(getattr(record, name)) for name in _EXTRAS if hasattr(record, name)},
        )
        return line.as_json() if self._is_json else line.as_text()

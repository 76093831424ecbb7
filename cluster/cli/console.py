"""How the command talks: errors in red on stderr, sizes and times for people. Covers words, not progress."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

FILE_WIDTH = 140  # of tables in a file or pipe, where no terminal says how wide it is


def stdout() -> Console:
    """Return the console for results; made per call, so that a redirected sys.stdout is honoured."""
    from rich.console import Console

    return Console(highlight=False, width=_width(sys.stdout))


def stderr() -> Console:
    """Return the console for everything that is not a result."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, width=_width(sys.stderr))


def _width(stream: TextIO) -> int | None:
    """Return a width; None lets rich ask the terminal, or COLUMNS."""
    return None if stream.isatty() or "COLUMNS" in os.environ else FILE_WIDTH


def print_error(message: str) -> None:
    """Print one red sentence."""
    from rich.text import Text

    stderr().print(Text(message.strip(), style="red"), soft_wrap=True)


def write(text: str) -> None:
    """Write to stdout at once, as it is."""
    sys.stdout.write(text)
    sys.stdout.flush()


def size(num_bytes: float) -> str:
    """Return bytes for a person: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def duration(seconds: float) -> str:
    """Return a time for a person: 42 s, 3 min 5 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"

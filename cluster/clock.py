"""Time as a parameter. Covers the one clock that code asks; not timers, which belong to asyncio."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """A monotonic clock in seconds."""

    def now(self) -> float:
        """Return monotonic seconds; on Linux comparable between processes of one machine."""
        ...


class SystemClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        return time.monotonic()
